"""The fast encoder of Hugging Face's model: the original's answers and gradients, or its forward with a reason."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DabDetrConfig
from transformers.models.dab_detr import modeling_dab_detr as original

from dab_fast import measure, ops
from dab_fast.accuracy import HIDDEN_TOLERANCE, errors
from tests.support.models import accelerated_copy, assert_same_gradients, huggingface_model, perturb_, wide
from tests.support.surgery import WHEN, Change, cases, check, mlp

B, S, D = 3, 21, 64  # more keys than a CPU's vector holds, and not a multiple of it

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "relu": {"activation_function": "relu"},
    "gelu": {"activation_function": "gelu"},
    "normalize_before": {"normalize_before": True},
    "one_layer": {"encoder_layers": 1},
    "wide_heads": {"encoder_attention_heads": 1},
}


@functools.cache
def encoder(**config: Any) -> nn.Module:
    return huggingface_model(**({"encoder_layers": 3} | config)).model.encoder


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens, pos = (torch.randn(B, S, D, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return tokens, pos


def mask(kind: str) -> Tensor | None:
    """1 = valid; the last image is padded in "padded", and nothing but padding in "blind"."""
    valid = {"none": [S, S, S], "all valid": [S, S, S], "padded": [S, S, S - 8], "blind": [S, S - 5, 0]}[kind]
    return None if kind == "none" else torch.arange(S).expand(B, S) < torch.tensor(valid)[:, None]


def run(module: Any, padded: bool | str = False) -> dict[str, Tensor]:
    tokens, pos = inputs(next(module.parameters()).dtype)
    kind = padded if isinstance(padded, str) else "padded" if padded else "none"
    out = module(tokens, mask(kind), pos, output_hidden_states=True, return_dict=True)
    states = {f"state{i}": x for i, x in enumerate(out.hidden_states[1:])}
    return {"out": out.last_hidden_state, **states, "d_tokens": tokens, "d_pos": pos}


def outputs_and_gradients(module: nn.Module, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    found = run(module, kind)
    leaves = {name: x for name, x in found.items() if name.startswith("d_")} | dict(module.named_parameters())
    generator = torch.Generator().manual_seed(3)
    outputs = {name: x for name, x in found.items() if not name.startswith("d_")}
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return outputs, dict(zip(leaves, gradients, strict=True))


def assert_parity(fast: nn.Module, theirs: nn.Module, kind: str) -> None:
    ours, right = (outputs_and_gradients(module, kind)[0] for module in (fast, theirs))
    for name, x in right.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=HIDDEN_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    # The original's mask in float64 is infinite in its softmax, which is in float32: a blind image would be NaN.
    copied = copy.deepcopy if kind == "blind" else wide
    assert_same_gradients(*(outputs_and_gradients(copied(module), kind)[1] for module in (fast, theirs)))


@pytest.mark.parametrize("kind", ["none", "all valid", "padded", "blind"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant, kind):
    theirs = encoder(**VARIANTS[variant])
    fast = accelerated_copy(theirs)
    assert_parity(fast, theirs, kind)
    with torch.no_grad():
        torch.testing.assert_close(run(fast, kind)["out"], run(theirs, kind)["out"], rtol=0, atol=HIDDEN_TOLERANCE)
    assert not fast.dab_fast_reasons


def test_parity_can_fail():
    fast = accelerated_copy(encoder())
    perturb_(fast.query_scale, seed=3, std=0.01)
    with pytest.raises(AssertionError):
        assert_parity(fast, encoder(), "none")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_wholly_padded_image_gets_the_mean_on_every_backend(backend):
    fast = accelerated_copy(encoder())
    with torch.no_grad(), ops.backend(backend):
        ours = run(fast, "blind")["out"]
        torch.testing.assert_close(ours, run(encoder(), "blind")["out"], rtol=0, atol=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision_errs_no_more_than_the_original(how, dtype):
    theirs = encoder()
    tokens, pos = inputs()
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(tokens.double(), mask("padded"), pos.double(), return_dict=True)
        found = []
        for module in (accelerated_copy(theirs), copy.deepcopy(theirs)):
            if how == "parameters":
                module.to(dtype)
            given = [x.to(dtype) if how == "parameters" else x for x in (tokens, pos)]
            with torch.autocast("cpu", dtype, enabled=how == "autocast"):
                found.append(module(given[0], mask("padded"), given[1], return_dict=True).last_hidden_state)
    ours, own = ({"out": x} for x in found)
    assert ours["out"].dtype == own["out"].dtype
    error = errors(ours, {"out": exact.last_hidden_state}, own)["out"]
    assert error.fine, error


def test_dropout_in_force_and_frozen_layers():
    theirs = copy.deepcopy(encoder(dropout=0.3)).train()
    fast = accelerated_copy(theirs)
    with torch.no_grad():
        torch.manual_seed(0)
        first = run(fast)["out"]
        assert not torch.equal(first, run(fast)["out"])
        samples = torch.stack([run(fast)["state0"] for _ in range(300)])
        right = torch.stack([run(theirs)["state0"] for _ in range(300)])
    spread = right.std(0).mean()
    assert (samples.mean(0) - right.mean(0)).abs().mean() < 3 * spread * (2 / 300) ** 0.5  # of means of 300 draws
    assert abs(samples.std(0).mean() / spread - 1) < 0.1
    for module in (fast, theirs):
        module.layers.eval()
    assert_parity(fast, theirs, "padded")
    assert not fast.dab_fast_reasons


def test_one_layer_drops():
    theirs = copy.deepcopy(encoder(dropout=0.3)).train()
    theirs.layers[0].eval()
    fast = accelerated_copy(theirs)
    torch.testing.assert_close(run(fast)["state0"], run(theirs)["state0"], rtol=0, atol=HIDDEN_TOLERANCE)
    assert any("dropout rates" in reason for reason in fast.dab_fast_reasons)


def hooked(e: Any) -> None:
    e.layers[1].fc1.register_forward_hook(lambda module, args, out: out * 1.5)


def another_attention(e: Any) -> None:
    e.layers[1].self_attn = OtherAttention(e.config)
    perturb_(e.layers[1].self_attn, seed=5)


class OtherAttention(original.DetrAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out.tanh(), weights


def two_heads(e: Any) -> None:
    attention = e.layers[1].self_attn
    attention.num_heads, attention.head_dim = 2, D // 2


@WHEN
@cases(
    Change("hook", hooked, "hook"),
    Change("another_attention", another_attention, "self_attn"),
    Change("query_scale_of_3", lambda e: setattr(e, "query_scale", mlp(e.query_scale, D, D, D, D)), "query_scale"),
    Change("query_scale_of_1", lambda e: setattr(e, "query_scale", mlp(e.query_scale, D, D)), "query_scale"),
    Change("fewer_layers", lambda e: setattr(e, "layers", e.layers[:2]), "layers", served=True),
    Change("another_scale", lambda e: setattr(e.layers[1].self_attn, "scaling", 0.5), "scaling"),
    Change("another_eps", lambda e: setattr(e.layers[1].final_layer_norm, "eps", 0.1), "eps"),
    Change("a_norm_at_the_end", lambda e: setattr(e, "norm", nn.LayerNorm(D)), "norm", served=True),
    Change("tanh", lambda e: setattr(e.layers[1], "activation_fn", nn.Tanh()), "activation"),
    Change("two_heads_in_one", two_heads, "heads"),
    Change("no_bias", lambda e: setattr(e.layers[1].self_attn.q_proj, "bias", None), "q_proj"),
    Change("bool_masks", lambda e: setattr(e.config, "_attn_implementation", "sdpa"), "config", padded=True),
)
def test_surgery(change, when):
    check(wide(encoder()), run, change, when)


def test_changes_after_a_first_call():
    theirs, fast = copy.deepcopy(encoder()), accelerated_copy(encoder())
    run(fast)
    for module in (theirs, fast):
        hooked(module)
    assert_parity(fast, theirs, "padded")
    assert any("hook" in reason for reason in fast.dab_fast_reasons)


def test_patched_functions(monkeypatch):
    theirs, fast = copy.deepcopy(encoder()), accelerated_copy(encoder())
    forward = original.DetrAttention.forward
    monkeypatch.setattr(original.DetrAttention, "forward", lambda *a, **k: (forward(*a, **k)[0] * 2, None))
    assert_parity(fast, theirs, "none")
    assert any("DetrAttention.forward" in reason for reason in fast.dab_fast_reasons)


def test_output_attentions_and_tuples():
    theirs, fast = encoder(), accelerated_copy(encoder())
    tokens, pos = inputs()
    with torch.no_grad():
        assert len(fast(tokens, None, pos, output_attentions=True).attentions) == 3
        assert any("output_attentions" in reason for reason in fast.dab_fast_reasons)
        for hidden in (False, True):
            ours, right = (e(tokens, None, pos, output_hidden_states=hidden, return_dict=False) for e in (fast, theirs))
            assert isinstance(ours, tuple) and len(ours) == len(right)
            torch.testing.assert_close(ours, right, rtol=0, atol=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "recompute"])
def test_recomputed_layers_keep_less_and_give_the_same(option):
    theirs = copy.deepcopy(encoder(dropout=0.0)).train()
    plain = accelerated_copy(theirs)
    fast = accelerated_copy(theirs, recompute=option == "recompute")
    if option == "gradient_checkpointing":
        for layer in fast.layers:
            layer.gradient_checkpointing = True
    assert_parity(fast, theirs, "padded")
    less, more = (measure.saved_bytes(lambda e=e: run(e)["out"], e.parameters()) for e in (fast, plain))
    assert less < 0.5 * more
    assert not fast.dab_fast_reasons


def test_nan_survives():
    fast = accelerated_copy(encoder())
    tokens, pos = inputs()
    with torch.no_grad():
        tokens[0, -1, 0] = torch.nan
        assert fast(tokens, None, pos)[0][0].isnan().all()
        assert not fast(tokens, None, pos)[0][1:].isnan().any()


def test_copies_and_pickles():
    fast = accelerated_copy(encoder())
    assert_parity(copy.deepcopy(fast), encoder(), "padded")
    loaded = pickle.loads(pickle.dumps(fast))
    assert type(loaded) is original.DabDetrEncoder
    assert_parity(loaded, encoder(), "padded")
    assert loaded.state_dict().keys() == encoder().state_dict().keys()


@pytest.mark.parametrize("kind", ["none", "padded"])
def test_compiled_without_a_break(kind):
    fast = accelerated_copy(encoder())
    tokens, pos = inputs()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    ours, right = (e(tokens, mask(kind), pos)[0] for e in (compiled, encoder()))
    torch.testing.assert_close(ours, right, rtol=0, atol=HIDDEN_TOLERANCE)


def test_no_scores_and_few_calls():
    """At full width, without padding: 14 calls a layer, four that join weights, and nothing of size S x S is kept."""
    theirs = original.DabDetrEncoder(DabDetrConfig()).eval()
    fast = accelerated_copy(theirs)
    tokens, pos = torch.randn(2, 300, 256), torch.randn(2, 300, 256)
    with torch.no_grad():
        assert measure.aten_calls(lambda: fast(tokens, None, pos)) <= 14 * 6 + 4
    ours, right = (measure.saved_bytes(lambda e=e: e(tokens, None, pos)[0], e.parameters()) for e in (fast, theirs))
    assert ours < 0.5 * right
