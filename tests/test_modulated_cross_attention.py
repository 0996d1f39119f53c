"""modulated_cross_attention on its Triton backend, among PyTorch's own machinery."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dab_fast import accuracy, ops, reference
from dab_fast.backends.torch.modulated_cross_attention import _blocks

NAMES = ("q_content", "q_pos", "k_content", "k_pos", "v")


DEVICES = pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))


def inputs(
    B=2, Q=9, S=20, H=2, d=16, d_v=32, dtype=torch.float32, shared_k_pos=False, device="cpu"
) -> dict[str, Tensor]:
    shapes = ((B, Q, H, d), (B, Q, H, d), (B, S, H, d), (1 if shared_k_pos else B, S, H, d), (B, S, H, d_v))
    return {name: torch.randn(shape).to(device, dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def results(function, tensors: dict[str, Tensor], **options) -> list[Tensor]:
    """The output, and the gradient of every tensor."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = function(**leaves, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), list(leaves.values()))]


@pytest.fixture
def triton():
    with ops.backend("triton"):
        yield


def test_it_is_the_composition_of_plain_pytorch():
    tensors = inputs(shared_k_pos=True)
    masks = {"key_padding_mask": torch.rand(2, 20) < 0.3, "attn_mask": torch.rand(9, 20) < 0.3}
    for options in ({}, masks, {"scale": 0.3}):
        with ops.backend("torch"):
            expected = results(ops.modulated_cross_attention, tensors, **options)
        with ops.backend("triton"):
            actual = results(ops.modulated_cross_attention, tensors, **options)
        # Both in fp32, sums of fewer than a hundred products of size one.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@DEVICES
@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_huge_logits(backend, device):
    """A box 1e-10 wide makes such logits. Each query then sees one key, and its weight is 1 and constant."""
    tensors = inputs(S=65, d=32, device=device)
    tensors["q_pos"] *= 1e10
    exact = results(reference.modulated_cross_attention, {name: x.double() for name, x in tensors.items()})
    with ops.backend(backend):
        out, *gradients = results(ops.modulated_cross_attention, tensors)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-6, atol=0)
    assert all(x.isfinite().all() for x in gradients)
    torch.testing.assert_close(gradients[-1].double(), exact[-1], rtol=0, atol=1e-6)


def in_pairs(x: Tensor) -> Tensor:
    """Every second key is the one before it: no logit is so large that one key has all the weight."""
    return x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]]


@DEVICES
@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("hidden", (False, True))
@pytest.mark.parametrize("keys", ("different", "pairs", "one"))
@pytest.mark.parametrize("logits", (1, 1e2, 1e4, 1e6))
def test_weights_and_their_mean_belong_together(logits, keys, hidden, backend, device):
    """The gradient of a logit, P (dP - D), is zero with one key, and next to nothing where one has all the weight."""
    tensors = inputs(Q=37, S=1 if keys == "one" else 70, d=32, device=device)
    for name in ("q_pos", "k_pos"):
        tensors[name] *= logits**0.5
    if keys == "pairs":
        tensors = {name: in_pairs(x) if name in ("k_content", "k_pos") else x for name, x in tensors.items()}
    masks = {}
    if hidden:
        size = tensors["k_pos"].shape[1]
        masks = {"key_padding_mask": torch.rand(2, size) < 0.3, "attn_mask": torch.rand(37, size) < 0.3}
        masks = {name: x.to(device) for name, x in masks.items()}
    exact = results(reference.modulated_cross_attention, {name: x.double() for name, x in tensors.items()}, **masks)
    own = results(reference.modulated_cross_attention, tensors, **masks)
    with ops.backend(backend):
        actual = results(ops.modulated_cross_attention, tensors, **masks)
    largest = max(x.norm() for x in exact[1:])
    for name, got, theirs, truth in zip(("out", *NAMES), actual, own, exact, strict=True):
        size = truth.norm().clamp(min=accuracy.NEGLIGIBLE * largest)
        error, own_error = ((x - truth).norm() / size for x in (got, theirs))
        assert error <= accuracy.allowed(own_error, accuracy.SHARP_FLOOR[torch.float32]), name


@pytest.mark.parametrize("masks", ((), ("key_padding_mask",), ("attn_mask",), ("key_padding_mask", "attn_mask")))
def test_plain_backward_in_several_blocks(masks):
    """More scores than are computed at once: some heads of one image at a time."""
    tensors = inputs(Q=300, S=1050, H=8, shared_k_pos=True)
    hide = {"key_padding_mask": torch.rand(2, 1050) < 0.3, "attn_mask": torch.rand(16, 300, 1050) < 0.3}
    given = {name: hide[name] for name in masks}
    assert len(list(_blocks(2, 8, 300 * 1050, "cpu"))) == 4
    with ops.backend("torch"):
        actual = results(ops.modulated_cross_attention, tensors, **given)
    expected = results(reference.modulated_cross_attention, tensors, **given)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())  # sums of 1050 numbers


@DEVICES
@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("dtype", accuracy.SHARP_FLOOR)
def test_sharp_attention_is_as_accurate_as_any(dtype, backend, device):
    """Logits of some hundreds, nearly one key per query: what cancels would show a rounding in between."""
    tensors = inputs(S=65, d=32, dtype=dtype, device=device)
    tensors["q_pos"] *= 100
    exact = results(reference.modulated_cross_attention, {name: x.double() for name, x in tensors.items()})
    own = results(reference.modulated_cross_attention, tensors)
    with ops.backend(backend):
        actual = results(ops.modulated_cross_attention, tensors)
    for name, got, theirs, truth in zip(("out", *NAMES), actual, own, exact, strict=True):
        error, own_error = ((x - truth).norm() / truth.norm() for x in (got, theirs))
        assert error <= accuracy.allowed(own_error, accuracy.SHARP_FLOOR[dtype]), name


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("d_v", (16, 32, 48))
def test_values_of_any_width(backend, d_v):
    tensors = inputs(d=16, d_v=d_v)
    with ops.backend(backend):
        actual = results(ops.modulated_cross_attention, tensors)
    expected = results(reference.modulated_cross_attention, tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_one_part_serves_self_attention():
    tensors = {name: x for name, x in inputs().items() if "pos" not in name}

    def attend(**x):
        return ops.modulated_cross_attention(x["q_content"], None, x["k_content"], None, x["v"])

    with ops.backend("torch"):
        expected = results(attend, tensors)
    with ops.backend("triton"):
        torch.testing.assert_close(results(attend, tensors), expected, rtol=1e-5, atol=1e-5)


def test_only_what_requires_grad_gets_one(triton):
    tensors = inputs()
    tensors["k_pos"].requires_grad_()
    tensors["v"].requires_grad_()
    ops.modulated_cross_attention(**tensors).sum().backward()
    assert [name for name, x in tensors.items() if x.grad is not None] == ["k_pos", "v"]
    with torch.no_grad():
        assert ops.modulated_cross_attention(**tensors).grad_fn is None


def test_opcheck():
    x = inputs(shared_k_pos=True)
    permuted = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in x.items()}
    padding, rng = torch.rand(2, 20) < 0.3, torch.tensor([1, 2])
    for tensors in (x, permuted):
        args = (*tensors.values(), padding, None, rng, 0.2, 0.1, True, "triton")
        torch.library.opcheck(torch.ops.dab_fast.modulated_cross_attention.default, args)
        out, stats = torch.ops.dab_fast.modulated_cross_attention(*args)
        args = (torch.randn_like(out), *args[:8], out, stats, 0.2, 0.1, [True, False, True, True, True], "triton")
        torch.library.opcheck(torch.ops.dab_fast.modulated_cross_attention_backward.default, args)


def test_compiled_in_one_dynamic_graph(triton):
    compiled = torch.compile(ops.modulated_cross_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ({"Q": 9, "S": 20}, {"Q": 12, "S": 33, "B": 3}):
        tensors = inputs(**sizes, shared_k_pos=True)
        padding = torch.rand(tensors["v"].shape[:2]) < 0.3
        actual = results(compiled, tensors, key_padding_mask=padding)
        expected = results(ops.modulated_cross_attention, tensors, key_padding_mask=padding)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_dynamic_shapes_need_one_graph(backend):
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(ops.modulated_cross_attention, fullgraph=True, dynamic=True, backend=count)
    with ops.backend(backend):
        for sizes in ({"B": 5}, {"B": 3}, {"B": 4, "Q": 12, "S": 33}):  # of equal sizes dynamo would make one symbol
            tensors = {name: x.requires_grad_() for name, x in inputs(**sizes).items()}
            compiled(**tensors).sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_autocast_computes_in_its_dtype(triton, dtype):
    tensors = inputs()
    tensors["v"] = tensors["v"].to(dtype)  # as a projection under autocast leaves it
    with torch.autocast("cpu", dtype):
        actual = results(ops.modulated_cross_attention, tensors)
    assert actual[0].dtype == dtype
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in tensors.values()]
    expected = results(ops.modulated_cross_attention, {name: x.to(dtype) for name, x in tensors.items()})
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.to(dtype), want, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_repeats_the_dropout(triton, reentrant):
    tensors = inputs()

    def checkpointed(**x):
        return checkpoint(
            lambda *parts: ops.modulated_cross_attention(*parts, dropout_p=0.5), *x.values(), use_reentrant=reentrant
        )

    torch.manual_seed(5)
    expected = results(ops.modulated_cross_attention, tensors, dropout_p=0.5)
    torch.manual_seed(5)
    if reentrant:  # which only speaks to backward()
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = checkpointed(**leaves)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        actual = [out.detach(), *(x.grad for x in leaves.values())]
    else:
        actual = results(checkpointed, tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_dropout_follows_the_default_generator(triton):
    tensors = inputs()
    torch.manual_seed(1)
    first, second = (ops.modulated_cross_attention(**tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = ops.modulated_cross_attention(**tensors, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_gradients_by_finite_differences(triton):
    """The op is fp32; in each direction the central difference of a smooth function errs by about step squared."""
    tensors = inputs(B=1, Q=3, S=5, H=1, shared_k_pos=True)
    padding = torch.tensor([[False, True, False, False, False]])
    _, *gradients = results(ops.modulated_cross_attention, tensors, key_padding_mask=padding)
    step = 1e-2
    for name, gradient in zip(NAMES, gradients, strict=True):
        direction = torch.randn_like(tensors[name])
        direction /= direction.norm()

        def value(shift, name=name, direction=direction):
            moved = tensors | {name: tensors[name] + shift * direction}
            out = ops.modulated_cross_attention(**moved, key_padding_mask=padding)
            return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().double()

        difference = (value(step) - value(-step)) / (2 * step)
        assert abs(difference - (gradient * direction).sum()) < 1e-3, name


def test_float16_saturates_what_autocast_casts(triton):
    tensors = inputs()
    tensors["q_pos"] *= 1e5
    with torch.autocast("cpu", torch.float16):
        assert all(x.isfinite().all() for x in results(ops.modulated_cross_attention, tensors))


@pytest.mark.parametrize(
    "change, reason",
    (
        ({"dtype": torch.float64}, "compute in float32, float16 or bfloat16, got torch.float64"),
        ({"d_v": 65}, "at most 64 wide, got 65"),
    ),
)
def test_a_backend_asked_for_by_name_says_why_it_cannot(triton, change, reason):
    with pytest.raises(RuntimeError, match=reason):
        ops.modulated_cross_attention(**inputs(**change))


def test_mixed_dtypes():
    tensors = inputs()
    tensors["v"] = tensors["v"].half()
    expected = results(reference.modulated_cross_attention, tensors)
    torch.testing.assert_close(results(ops.modulated_cross_attention, tensors), expected, rtol=0, atol=0)


def test_mixed_dtypes_are_named(triton):
    tensors = inputs()
    tensors["v"] = tensors["v"].half()
    with pytest.raises(RuntimeError, match=r"one dtype for all tensors, got .*float32.*float16"):
        ops.modulated_cross_attention(**tensors)


@pytest.mark.parametrize("sizes", ({"B": 0}, {"Q": 0}, {"S": 0}), ids=str)
def test_nothing_to_do(triton, sizes):
    tensors = inputs(**sizes)
    out, *gradients = results(ops.modulated_cross_attention, tensors)
    assert (out == 0).all()
    for gradient, x in zip(gradients, tensors.values(), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("keys", (3, 37))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("special", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_so(special, masked, keys, dtype, backend):
    """PyTorch's fused attention makes zeros of a query that is NaN, where keys are few or some are hidden."""
    visible = keys - masked
    options = {"key_padding_mask": torch.arange(keys).expand(2, keys) >= visible} if masked else {}
    for name in ("q_content", "k_content", "v"):
        tensors = inputs(Q=5, S=keys, dtype=dtype)
        tensors[name][-1, -2] = special  # of keys the last that is seen
        with ops.backend(backend):
            ours = results(ops.modulated_cross_attention, tensors, **options)
        theirs = results(reference.modulated_cross_attention, tensors, **options)
        assert not theirs[0].isfinite().all()
        for of, x, y in zip(("out", *NAMES), ours, theirs, strict=True):
            seen = slice(visible if of in NAMES[2:] else None)  # the gradient of a hidden key may stay zero
            assert not x[:, seen][~y[:, seen].isfinite()].isfinite().any(), f"{name}: {of}"
