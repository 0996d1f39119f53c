"""Every autograd Function of dab_fast has a first derivative only: a second one raises, however it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dab_fast import ops
from dab_fast.parts import dense

D = 8


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def attention(x):
    heads = x.view(1, 3, 2, D // 2)
    return ops.modulated_cross_attention(heads, heads, heads, heads, heads)


def refine(x):
    weights = [draw(*shape) for shape in ((D, D), (D,), (D, D), (D,), (4, D), (4,))]
    return ops.refine_boxes(x, draw(3, 4).sigmoid(), *weights, eps=1e-3)


def embed(x):
    return ops.box_position_embed(x[:, :4].sigmoid(), num_feats=4)[0]


def projection(x):
    return dense.self_attention_projection(x, x, [draw(D, D)] * 5, draw(3 * D))


def ffn(x):
    shapes = {"linear1.weight": (5, D), "linear1.bias": (5,), "linear2.weight": (D, 5), "linear2.bias": (D,)}
    return dense.ffn({f"layer.{name}": draw(*shape) for name, shape in shapes.items()}, "layer", x, "gelu", 0.0)


FUNCTIONS = {
    "joint_linear": (
        "torch",
        lambda x: dense.joint_linear(x, (draw(D, D).requires_grad_(), x[:, :D]), (x[0], x[:3, 0])),
    ),
    "self_attention_projection": ("torch", projection),
    "ffn": ("torch", ffn),
    "attention": ("torch", attention),
    "attention_triton": ("triton", attention),
    "box_position_embed": ("triton", embed),
    "sine_embed": ("triton", lambda x: ops.sine_embed(x.sigmoid(), 4)),
    "refine_boxes": ("triton", refine),
}
ASK = {
    "backward": lambda penalty, x: penalty.backward(),
    "grad": lambda penalty, x: torch.autograd.grad(penalty, x, allow_unused=True),
    # Terms of the same input that can be differentiated must not hide those that cannot.
    "grad_of_more": lambda penalty, x: torch.autograd.grad(penalty + x.square().sum(), x),
}


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_raises(name, loss, ask):
    backend, function = FUNCTIONS[name]
    x = draw(3, D).requires_grad_()
    with ops.backend(backend):
        (slope,) = torch.autograd.grad(loss(function(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^dab_fast.* call dab_fast\.restore\(model\) before"):
            ASK[ask](slope.square().sum(), x)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_create_graph_alone_changes_nothing(name, checkpointed):
    backend, function = FUNCTIONS[name]
    x = draw(3, D).requires_grad_()

    def y():
        return checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)

    with ops.backend(backend):
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
        (got,) = torch.autograd.grad(y().square().sum(), x, create_graph=True)
    assert torch.equal(got, expected)
