"""The encoder of IDEA-Research's models: parity, what is left to the original, and what a call keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dab_fast
from dab_fast import measure
from dab_fast.accuracy import HIDDEN_TOLERANCE
from tests.support.idea_encoder import TransformerEncoder, TransformerEncoderLayer, encoder
from tests.support.models import assert_same_gradients

B, S, D = 3, 21, 32
PADDED = torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 8], [S - 1]])
VARIANTS = {"prelu": {}, "relu": {"activation": "relu"}, "norm": {"norm": True, "activation": "gelu"}}
VARIANTS["one layer"] = {"num_layers": 1, "activation": "silu"}


def accelerated(theirs):
    ours = copy.deepcopy(theirs)
    report = dab_fast.accelerate(ours)
    assert report.parts == {"": ("encoder",)}, report
    return ours


def inputs(dtype=torch.float32):
    """As a model gives them: views of feature maps."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, D, S, generator=generator).to(dtype).permute(2, 0, 1).requires_grad_() for _ in range(2)]


def run(module, padded=None, dtype=torch.float32):
    """The output, and the gradients of inputs and parameters."""
    src, pos = inputs(dtype)
    out = module(src, src_key_padding_mask=padded, pos=pos)
    leaves = {"src": src, "pos": pos} | dict(module.named_parameters())
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(S, B, D)
    gradients = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()))
    return out, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("padded", [None, PADDED], ids=["valid", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant, padded):
    theirs = encoder(**VARIANTS[variant])
    ours = accelerated(theirs)
    src, pos = inputs()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = (x(src, src_key_padding_mask=padded, pos=pos) for x in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=HIDDEN_TOLERANCE)
    assert not ours.dab_fast_reasons


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("padded", [None, PADDED], ids=["valid", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant, padded):
    theirs = encoder(**VARIANTS[variant]).double()
    ours = accelerated(theirs)
    (found, gradients), (expected, right) = (run(x, padded, torch.float64) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients, right)
    assert not ours.dab_fast_reasons


def test_dropout_in_force():
    """In training the mean over many draws is near what evaluation gives, and two draws differ."""
    theirs = encoder(num_layers=1, dropout=0.2)
    ours = accelerated(theirs)
    src, pos = (x.detach() for x in inputs())
    draws = torch.stack([ours(src, pos=pos) for _ in range(200)])
    right = torch.stack([theirs(src, pos=pos) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    spread = (draws.std(0) + right.std(0)) / 200**0.5
    assert ((draws.mean(0) - right.mean(0)).abs() / spread).max() < 6
    torch.testing.assert_close(ours.eval()(src, pos=pos), theirs.eval()(src, pos=pos), rtol=0, atol=HIDDEN_TOLERANCE)
    assert not ours.dab_fast_reasons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64(dtype):
    theirs = encoder()
    src, pos = inputs()
    exact = copy.deepcopy(theirs).double()(src.double(), pos=pos.double())
    ours = accelerated(theirs)
    errors = []
    for module in (ours, theirs):
        with torch.autocast("cpu", dtype), torch.no_grad():
            errors.append((module(src, pos=pos).double() - exact).abs().mean().item())
    assert errors[0] <= 1.1 * errors[1]
    assert not ours.dab_fast_reasons


CHANGES = {
    "hook": (lambda x: x.layers[1].self_attn.out_proj.register_forward_hook(lambda *_: None), "has a hook"),
    "query_scale": (lambda x: x.query_scale.layers.append(nn.Linear(D, D)), "query_scale"),
    "keys of its own": (lambda x: attention(x, add_bias_kv=True), "keys of its own"),
    "batch first": (lambda x: attention(x, batch_first=True), "batch first"),
    "without a bias": (lambda x: attention(x, bias=False), "in_proj_bias is absent"),
    "patched layer": (lambda x: setattr(x.layers[0], "forward", x.layers[0].forward), "patched forward"),
    "dropped order": (lambda x: setattr(x, "__class__", Reversed), "not what the original computes"),
}


def attention(module, **settings):
    for layer in module.layers:
        layer.self_attn = nn.MultiheadAttention(D, 4, **settings)


class Reversed(TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None, pos=None):
        for layer in reversed(self.layers):
            src = layer(src, mask, src_key_padding_mask, pos * self.query_scale(src))
        return src


@pytest.mark.parametrize("change", CHANGES)
def test_what_accelerate_leaves_alone(change):
    module = encoder()
    apply, reason = CHANGES[change]
    apply(module)
    with pytest.raises(ValueError, match=reason):
        dab_fast.accelerate(module)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("dropped order", "batch first")])
def test_changes_after_accelerate(change):
    theirs = encoder().eval()
    ours = accelerated(theirs)
    src, pos = inputs()
    for module in (theirs, ours):
        module(src, pos=pos)
        torch.manual_seed(3)
        CHANGES[change][0](module)
    assert torch.equal(ours(src, pos=pos), theirs(src, pos=pos))
    assert CHANGES[change][1] in str(ours.dab_fast_reasons)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"mask": torch.zeros(S, S)}, "mask is given"),
        ({"pos": torch.randn(S, 1, D)}, "pos has shape"),
        ({"src_key_padding_mask": torch.zeros(B, S)}, "src_key_padding_mask is torch.float32"),
    ],
)
def test_calls_that_take_the_original_forward(given, reason):
    theirs = encoder().eval()
    ours = accelerated(theirs)
    src, pos = inputs()
    with torch.no_grad():
        assert torch.equal(*(x(src, **({"pos": pos} | given)) for x in (ours, theirs)))
    assert reason in str(ours.dab_fast_reasons)


def test_errors_are_the_originals():
    theirs = encoder()
    ours = accelerated(theirs)
    for given in ((inputs()[0],), (torch.randn(S, D), torch.zeros(S, D)), ()):
        messages = []
        for module in (ours, theirs):
            with pytest.raises((TypeError, RuntimeError, AssertionError)) as error:
                module(*given)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_recomputed_layers_keep_less_and_give_the_same():
    theirs = encoder()
    plain, recomputed = accelerated(theirs), copy.deepcopy(theirs)
    dab_fast.accelerate(recomputed, recompute=True)
    src, pos = inputs()
    more, less = (measure.saved_bytes(lambda m=m: m(src, pos=pos), m.parameters()) for m in (plain, recomputed))
    assert less < more / 2
    assert_same_gradients(run(recomputed)[1], run(plain)[1])


def test_names_copies_and_restore():
    theirs = encoder().eval()
    ours = accelerated(theirs)
    src, pos = inputs()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(copy.deepcopy(ours)(src, pos=pos), ours(src, pos=pos))
    dab_fast.restore(ours)
    assert type(ours) is TransformerEncoder
    assert torch.equal(ours(src, pos=pos), theirs(src, pos=pos))


def test_compiled_without_a_break():
    theirs = encoder().eval()
    src, pos = inputs()
    compiled = torch.compile(accelerated(theirs), backend="eager", fullgraph=True)
    found = compiled(src, src_key_padding_mask=PADDED, pos=pos)
    torch.testing.assert_close(found, theirs(src, src_key_padding_mask=PADDED, pos=pos), rtol=0, atol=HIDDEN_TOLERANCE)


def test_fewer_calls_and_no_scores():
    theirs = TransformerEncoder(TransformerEncoderLayer(64, 4, 96), 3, d_model=64)
    ours = accelerated(theirs)
    src, pos = torch.randn(2, 100, 1, 64)
    calls = [measure.count(lambda m=m: m(src, pos=pos).sum().backward()).aten.total() for m in (ours, theirs)]
    assert calls[0] < calls[1]
    kept = [measure.saved_bytes(lambda m=m: m(src, pos=pos), m.parameters()) for m in (ours, theirs)]
    assert kept[0] < kept[1]
