"""The attention kernels against float64, in the interpreter."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dab_fast import accuracy
from dab_fast.backends.triton.configs import AttentionConfig, key_splits
from dab_fast.backends.triton.modulated_cross_attention import addressable, backward, forward

NAMES = ("q_content", "q_pos", "k_content", "k_pos", "v")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionCase:
    B: int = 2
    Q: int = 37
    S: int = 65
    H: int = 2
    d: int = 32
    d_pos: int | None = 32
    d_v: int = 32
    dtype: torch.dtype = torch.float32
    padding: str | None = None  # "ragged": some keys of each image; "all": one image whole
    hidden: int | None = None  # dimensions of the attention mask
    shared_k_pos: bool = False
    layout: str = "dense"
    config: AttentionConfig | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        default = AttentionCase()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "plain"

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.d + (self.d_pos or 0))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers behind other strides."""
    if layout == "slices":  # a slice of the output of one wide projection
        wide = torch.randn(*x.shape[:2], 3, *x.shape[2:], device=x.device).to(x.dtype)
        wide[:, :, 1] = x
        return wide[:, :, 1]
    if layout == "permuted":  # [N, B, H, d] underneath, as in the sequence-first codebases
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns":  # the last dimension is not dense
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def log_sum_exp(stats: Tensor, scale: float) -> Tensor:  # of the logits, from [2, B, H, Q]
    largest, log_l = stats
    return torch.where(log_l == float("inf"), -log_l, largest * scale + log_l * math.log(2))


@dataclass
class Problem:
    inputs: dict[str, Tensor | None]
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    d_out: Tensor

    @classmethod
    def random(cls, case: AttentionCase) -> "Problem":
        def draw(*shape: int) -> Tensor:
            return laid_out(torch.randn(shape, device=case.device).to(case.dtype), case.layout)

        B, Q, S, H = case.B, case.Q, case.S, case.H
        inputs: dict[str, Tensor | None] = {
            "q_content": draw(B, Q, H, case.d),
            "q_pos": None if case.d_pos is None else draw(B, Q, H, case.d_pos),
            "k_content": draw(B, S, H, case.d),
            "k_pos": None if case.d_pos is None else draw(1 if case.shared_k_pos else B, S, H, case.d_pos),
            "v": draw(B, S, H, case.d_v),
        }
        padding = hidden = None
        if case.padding is not None:
            padding = torch.rand(B, S, device=case.device) < 0.3
            padding[-1, S // 2 :] = True
            padding[0, : S // 3] = True
            if case.padding == "all":
                padding[0] = True
        if case.hidden is not None:
            hidden = torch.rand((Q, S) if case.hidden == 2 else (B * H, Q, S), device=case.device) < 0.4
            hidden[..., Q // 2, :] = True  # one query sees nothing
        return cls(inputs, padding, hidden, draw(B, Q, H, case.d_v))

    def run(self, case: AttentionCase, dropout_p: float = 0.0, rng: Tensor | None = None) -> dict[str, Tensor]:
        arguments = (*self.inputs.values(), self.key_padding_mask, self.attn_mask, rng)
        out, stats, *wide = forward(*arguments, case.scale, dropout_p, True, case.config)
        needs = [x is not None for x in self.inputs.values()]
        kept = *(wide or [out]), stats
        configs = {"query_config": case.config, "key_config": case.config}
        gradients = backward(self.d_out, *arguments, *kept, case.scale, dropout_p, needs, **configs)
        results = {"out": out, "lse": log_sum_exp(stats, case.scale)}
        names = [name for name, need in zip(NAMES, needs, strict=True) if need]
        return results | {f"d_{name}": g for name, g in zip(names, gradients, strict=True)}

    def expected(self, case: AttentionCase, dtype: torch.dtype, weights: Tensor | float = 1.0) -> dict[str, Tensor]:
        """The plain writing and PyTorch's own gradients in `dtype`; `weights` stands for dropout, [B, H, Q, S]."""
        x = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in self.inputs.items()}
        logits = torch.einsum("bqhd,bshd->bhqs", x["q_content"], x["k_content"])
        if x["q_pos"] is not None:
            k_pos = x["k_pos"].expand(case.B, -1, -1, -1)
            logits = logits + torch.einsum("bqhd,bshd->bhqs", x["q_pos"], k_pos)
        logits = logits * case.scale
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        if self.key_padding_mask is not None:
            hidden = hidden | self.key_padding_mask[:, None, None, :]
        if self.attn_mask is not None:
            mask = self.attn_mask
            hidden = hidden | (mask if mask.dim() == 2 else mask.unflatten(0, (case.B, case.H)))
        logits = logits.masked_fill(hidden, float("-inf"))
        lse = logits.logsumexp(-1)
        # Rows that see nothing are zeros, and have to be kept away from the softmax for its gradient's sake.
        blind = hidden.all(-1, keepdim=True)
        weights = logits.masked_fill(blind, 0).softmax(-1).masked_fill(hidden, 0) * weights
        out = torch.einsum("bhqs,bshd->bqhd", weights, x["v"])
        leaves = {k: t for k, t in x.items() if t is not None}
        gradients = torch.autograd.grad(out, list(leaves.values()), self.d_out.to(dtype))
        results = {"out": out.detach(), "lse": lse.detach()}
        return results | {f"d_{k}": g for k, g in zip(leaves, gradients, strict=True)}


def assert_accurate(actual: dict[str, Tensor], problem: Problem, case: AttentionCase) -> None:
    """At most twice PyTorch's own error in the dtype, and a floor."""
    exact, pytorch = problem.expected(case, torch.float64), problem.expected(case, case.dtype)
    assert actual.keys() == exact.keys()
    largest = {name: x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0 for name, x in exact.items()}
    for name, reference in exact.items():
        got = actual[name]
        assert got.shape == reference.shape, name
        assert got.dtype == (torch.float32 if name == "lse" else case.dtype), name
        finite = reference.isfinite()
        assert torch.equal(got.isfinite(), finite), f"{name} must be finite where the exact value is"
        if not finite.any():
            continue
        error = (got.double() - reference)[finite].abs().max().item()
        own = (pytorch[name].double() - reference)[finite].abs().max().item()
        unit = max(1.0, largest[name] if largest[name] > 1e-12 else max(largest.values()))
        allowed = accuracy.allowed(own, accuracy.ATTENTION_FLOOR[case.dtype] * unit)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, PyTorch's own {own:.2e}"


def check(case: AttentionCase) -> None:
    problem = Problem.random(case)
    assert_accurate(problem.run(case), problem, case)


SMALL = AttentionConfig(block_q=16, block_s=16, num_warps=4, num_stages=2)
HALVES = DTYPES[1:]

CASES = [
    AttentionCase(),
    *(AttentionCase(Q=q, S=64) for q in (1, 7, 64, 65)),
    *(AttentionCase(S=s, Q=7) for s in (1, 63, 64, 192)),
    *(AttentionCase(d=w, d_pos=w, d_v=w, Q=7) for w in (16, 64)),
    AttentionCase(d=24, d_pos=40, d_v=20, Q=7),
    *(AttentionCase(dtype=dtype, padding="ragged") for dtype in HALVES),
    *(AttentionCase(dtype=dtype, Q=7, S=1) for dtype in HALVES),
    AttentionCase(d_pos=None),
    AttentionCase(d_pos=None, hidden=3, Q=65),
    AttentionCase(padding="ragged", S=192),
    AttentionCase(padding="all"),
    AttentionCase(hidden=2),
    AttentionCase(hidden=3, padding="all"),
    AttentionCase(shared_k_pos=True, padding="ragged", B=3),
    AttentionCase(shared_k_pos=True, dtype=torch.float16, B=3),
    AttentionCase(shared_k_pos=True, B=1, Q=7),
    *(AttentionCase(layout=layout, padding="ragged") for layout in ("slices", "permuted", "columns")),
    AttentionCase(config=SMALL, padding="ragged", hidden=2, S=40),
    *(AttentionCase(config=replace(SMALL, splits=n), S=100, Q=20) for n in (2, 3, 7, 50)),
    AttentionCase(config=replace(SMALL, splits=3), S=100, Q=20, padding="all", hidden=3, dtype=torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [*CASES, AttentionCase(Q=300, S=1050, H=8), AttentionCase(Q=300, S=1050, H=8, padding="all")], ids=str
)
def test_forward_and_gradients_on_a_gpu(case, dtype, fp32_precision):
    check(replace(case, dtype=dtype, device="cuda"))


@pytest.mark.sweep
@pytest.mark.parametrize("padding", (None, "ragged", "all"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", (1, 63, 64, 65, 192, 1050))
@pytest.mark.parametrize("Q", (1, 7, 37, 300, 301))
def test_forward_and_gradients_over_the_matrix(Q, S, dtype, padding):
    check(AttentionCase(Q=Q, S=S, H=1, dtype=dtype, padding=padding, shared_k_pos=Q == 37))
    check(AttentionCase(Q=Q, S=S, H=2, B=1, dtype=dtype, padding=padding, d_pos=None))


@pytest.mark.sweep
@pytest.mark.parametrize("layout", ("slices", "permuted", "columns"))
@pytest.mark.parametrize("hidden", (None, 2, 3))
@pytest.mark.parametrize("width", (16, 32, 64))
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_over_widths_masks_and_strides(dtype, width, hidden, layout):
    case = AttentionCase(d=width, d_pos=width, d_v=width, Q=70, S=130, dtype=dtype, hidden=hidden, layout=layout)
    check(replace(case, padding="ragged"))
    check(replace(case, config=replace(SMALL, splits=4)))


@pytest.mark.parametrize("sizes", ({"B": 0}, {"Q": 0}, {"S": 0}), ids=str)
def test_nothing_to_do(sizes):
    case = AttentionCase(**sizes)
    results = Problem.random(case).run(case)
    shape = (case.B, case.Q, case.H)
    assert results["out"].shape == (*shape, case.d_v)
    for name, x in results.items():
        if name == "lse":
            assert (x == float("-inf")).all()
        else:
            assert torch.equal(x, torch.zeros_like(x)), name


def test_a_row_without_a_visible_key_is_zero_and_has_no_gradient():
    case = AttentionCase(padding="all", hidden=2)
    problem = Problem.random(case)
    results = problem.run(case)
    blind = case.Q // 2
    for image, query in ((0, slice(None)), (1, blind)):
        for name in ("out", "d_q_content", "d_q_pos"):
            assert (results[name][image, query] == 0).all(), name
    for name in ("d_k_content", "d_k_pos", "d_v"):
        assert (results[name][problem.key_padding_mask] == 0).all(), name


def test_padded_keys_are_not_read_into_any_result():
    case = AttentionCase(padding="ragged", S=200)
    problem = Problem.random(case)
    before = problem.run(case)
    for name in ("k_content", "k_pos", "v"):
        problem.inputs[name][problem.key_padding_mask] = 1e4
    after = problem.run(case)
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


def test_reruns_are_bit_identical():
    case = AttentionCase(config=replace(SMALL, splits=3), Q=20, dtype=torch.float16, shared_k_pos=True)
    problem = Problem.random(case)
    first, second = problem.run(case), problem.run(case)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone_is_the_same(wanted):
    case = AttentionCase(Q=20, S=40, padding="ragged", shared_k_pos=True)
    problem = Problem.random(case)
    every = problem.run(case)
    arguments = (*problem.inputs.values(), problem.key_padding_mask, None, None)
    needs = [name == wanted for name in NAMES]
    kept = forward(*arguments, case.scale, 0.0, True)
    (gradient,) = backward(problem.d_out, *arguments, *kept, case.scale, 0.0, list(needs))
    assert torch.equal(gradient, every[f"d_{wanted}"])


def test_what_the_kernels_cannot_address_is_copied():
    for strides, copied in (
        ((0, 96, 32, 1), False),
        ((1, 96, 32, 2), True),  # the last dimension is not dense
        ((0, 2**25, 32, 1), True),  # 64 rows span more than 32 bits
    ):
        x = torch.empty_strided((2, 3, 1, 16), strides, device="meta")
        assert (addressable(x) is not x) == copied, strides
    mask = torch.empty_strided((64, 8), (2**26, 1), dtype=torch.bool, device="meta")
    assert addressable(mask, -2) is not mask


def test_incoming_gradient_of_any_strides():
    case = AttentionCase(Q=20, S=40)
    problem = Problem.random(case)
    dense = problem.run(case)
    for layout in ("slices", "permuted", "columns"):
        problem.d_out = laid_out(problem.d_out, layout)
        for name, x in problem.run(case).items():
            assert torch.equal(x, dense[name]), (layout, name)
    problem.d_out = torch.ones(()).expand(problem.d_out.shape)  # that of a sum
    assert_accurate(problem.run(case), problem, case)


# With v the identity, out is the matrix of weights itself: dropout can be read off.
DROPOUT = AttentionCase(Q=100, S=64, d_v=64)
P = 0.3


def dropped_weights(problem: Problem, case: AttentionCase, rng: Tensor, dropout_p: float = P) -> Tensor:  # [B, H, Q, S]
    """R of the kernels: 0 or 1 / (1 - p), from the ratio of the weights with and without dropout."""
    eye = torch.eye(case.S).expand(case.B, case.H, -1, -1).transpose(1, 2).to(case.dtype)
    probe = replace(problem, inputs={**problem.inputs, "v": eye})
    arguments = (*probe.inputs.values(), None, None)
    (thinned,) = forward(*arguments, rng, case.scale, dropout_p, False, case.config)
    (whole,) = forward(*arguments, None, case.scale, 0.0, False, case.config)
    return (thinned / whole).transpose(1, 2).double()


def test_dropout_keeps_the_right_share_and_scale():
    rng = torch.tensor([20, 26])
    weights = dropped_weights(Problem.random(DROPOUT), DROPOUT, rng)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (1 - P)), rtol=1e-5, atol=0)
    n = kept.numel()
    # Five standard deviations of a binomial count, whole and per row and column group.
    assert abs(kept.double().mean() - (1 - P)) < 5 * math.sqrt(P * (1 - P) / n)
    for dim in range(4):
        share = kept.double().mean([d for d in range(4) if d != dim])
        assert (share - (1 - P)).abs().max() < 5 * math.sqrt(P * (1 - P) * kept.shape[dim] / n)
    # Neighbours along every dimension are independent.
    for dim in range(4):
        a, b = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        both = (a & b).double().mean()
        assert abs(both - (1 - P) ** 2) < 6 * math.sqrt((1 - P) ** 2 / a.numel()), dim


def test_seeds_and_offsets_give_independent_masks():
    problem = Problem.random(DROPOUT)
    first = dropped_weights(problem, DROPOUT, torch.tensor([1, 0])) != 0
    assert torch.equal(first, dropped_weights(problem, DROPOUT, torch.tensor([1, 0])) != 0)
    for state in ((2, 0), (1, 1), (1 + (1 << 32), 0), (-1, -1)):
        other = dropped_weights(problem, DROPOUT, torch.tensor(state)) != 0
        both = (first & other).double().mean()
        assert abs(both - (1 - P) ** 2) < 6 * math.sqrt((1 - P) ** 2 / first.numel()), state


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_dropout_has_the_same_mask_in_backward_whatever_the_tiles(dtype):
    case = AttentionCase(Q=20, S=64, d_v=32, dtype=dtype)
    problem = Problem.random(case)
    rng = torch.tensor([7, 3])
    kept = dropped_weights(problem, replace(case, d_v=case.S), rng)
    weights = torch.where(kept == 0, 0.0, 1 / (1 - P)).double()
    exact = problem.expected(case, torch.float64, weights)
    for config in (None, AttentionConfig(16, 32, 4, 2, splits=2)):
        for name, got in problem.run(replace(case, config=config), P, rng).items():
            # As without dropout; the weights that are kept are 1 / (1 - p) larger.
            bound = 2 * accuracy.ATTENTION_FLOOR[dtype] * max(1.0, exact[name].abs().max())
            assert (got.double() - exact[name]).abs().max() < bound, (config, name)


def test_dropout_of_everything():
    case = AttentionCase(Q=7, S=20)
    problem = Problem.random(case)
    results = problem.run(case, 1.0, torch.tensor([1, 1]))
    for name, x in results.items():
        if name != "lse":
            assert (x == 0).all(), name


def test_keys_are_split_to_fill_the_processor():
    sms = 132
    assert (
        key_splits(40, 17, sms) == 4
    )  # one image, 300 queries in 5 blocks, 8 heads, 1050 keys: each split has 4 blocks
    assert key_splits(40, 66, sms) == 6  # 4200 keys: two programs on each SM
    assert key_splits(8, 66, sms) == 8  # few queries: as many as the combine kernel takes
    assert key_splits(40, 5, sms) == 1  # self-attention
    assert key_splits(1280, 66, sms) == 1  # 32 images fill it as they are


def test_heads_wider_than_the_tables_are_refused():
    case = AttentionCase(d=65, Q=7, S=7)
    with pytest.raises(ValueError, match="at most 64 wide, got 65"):
        Problem.random(case).run(case)
