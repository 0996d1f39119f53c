"""Every op on every backend that runs here, and the decoder, against the specification in float64.

A result passes if its error is at most twice that of the specification itself, run in plain PyTorch in the same dtype,
plus some roundings of the largest element: four in float32, where the sums of a fused kernel run in another order; one
in half precision, which only rounds a sum that ran in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dab_fast import ops, reference
from dab_fast.config import DecoderConfig
from dab_fast.decoder import DabDecoder
from dab_fast.ops import _backends

ERROR_RATIO = 2.0
ROUNDINGS = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# A gradient smaller than this part of the largest one is rounding: that of a key's bias is zero analytically.
NEGLIGIBLE = 1e-3

Call = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An op on random inputs."""

    op: str
    variant: str
    call: Call  # the op, with keyword arguments only
    specification: Call
    inputs: Inputs  # float64, or bool for masks
    fixed: Mapping[str, Any]


def cases() -> list[Case]:
    """Odd sizes, both masks, both numbers of coordinates; a query whose keys are all masked."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return 0.03 + 0.94 * torch.rand(shape, generator=generator, dtype=torch.float64)

    padding = torch.zeros(2, 45, dtype=torch.bool)
    padding[1, 30:] = True
    groups = torch.rand(19, 19, generator=generator) < 0.3
    groups[3] = True  # sees nothing: zeros
    heads = (2, 32)
    attention = ("modulated_cross_attention", ops.modulated_cross_attention, reference.modulated_cross_attention)
    embedding = ("box_position_embed", ops.box_position_embed, reference.box_position_embed)
    found: list[tuple[str, tuple[str, Call, Call], Inputs, dict[str, Any]]] = [
        (
            "modulated boxes",
            embedding,
            dict(boxes=uniform(2, 19, 4), scale=normal(2, 19, 64), ref_size_logits=normal(2, 19, 2)),
            {"num_feats": 32},
        ),
        ("points", embedding, dict(boxes=uniform(2, 19, 2), scale=normal(64)), {"num_feats": 32}),
        (
            "two parts, padded",
            attention,
            dict(
                q_content=normal(2, 19, *heads),
                q_pos=normal(2, 19, *heads),
                k_content=normal(2, 45, *heads),
                k_pos=normal(1, 45, *heads),
                v=normal(2, 45, *heads),
                key_padding_mask=padding,
            ),
            {},
        ),
        (
            "one part, masked",
            attention,
            dict(
                q_content=normal(2, 19, *heads),
                k_content=normal(2, 19, *heads),
                v=normal(2, 19, *heads),
                attn_mask=groups,
            ),
            {"q_pos": None, "k_pos": None},
        ),
        (
            "boxes",
            ("refine_boxes", ops.refine_boxes, reference.refine_boxes),
            dict(
                hidden=normal(2, 19, 64),
                boxes=uniform(2, 19, 4),
                w1=normal(64, 64) / 8,
                b1=normal(64) / 8,
                w2=normal(64, 64) / 8,
                b2=normal(64) / 8,
                w3=normal(4, 64) / 8,
                b3=normal(4) / 8,
            ),
            {"eps": 1e-3},
        ),
    ]
    return [Case(op, variant, call, spec, inputs, fixed) for variant, (op, call, spec), inputs, fixed in found]


@dataclass(frozen=True)
class Errors:
    """The largest error of outputs and of gradients, and what is allowed; each in units of its largest element."""

    output: float
    output_allowed: float
    gradient: float
    gradient_allowed: float

    @property
    def fine(self) -> bool:
        return self.output <= self.output_allowed and self.gradient <= self.gradient_allowed  # false for NaN


def run(device: torch.device, say: Callable[[str], None]) -> bool:
    """Says a verdict per line; returns whether all are fine."""
    say(f"dab_fast on {device}, torch {torch.__version__}: errors against float64, relative to the largest element")
    fine = True
    for what, result in verdicts(device):
        if isinstance(result, str):
            say(f"skip  {what}  {result}")
            continue
        fine = fine and result.fine
        say(
            f"{'ok  ' if result.fine else 'FAIL'}  {what}  "
            f"output {result.output:.1e} (allowed {result.output_allowed:.1e})  "
            f"gradients {result.gradient:.1e} (allowed {result.gradient_allowed:.1e})"
        )
    say("every result is within its tolerance" if fine else "FAIL: a result is wrong")
    return fine


def verdicts(device: torch.device) -> Iterator[tuple[str, Errors | str]]:
    """What was tested, and its errors, or why it cannot run here."""
    skipped = set()
    for case in cases():
        for backend in _backends.BACKENDS:
            reason = _backends.why_not(backend, case.op, device)
            if reason is not None:
                if (case.op, backend) not in skipped:
                    skipped.add((case.op, backend))
                    yield f"{case.op:26}{'':19}{backend:8}", reason
                continue
            for dtype in ROUNDINGS:
                what = f"{case.op:26}{case.variant:19}{backend:8}{_short(dtype):9}"
                try:
                    with _backends.backend(backend):
                        yield what, compare(case.call, case.specification, case.inputs, case.fixed, device, dtype)
                except _backends.BackendUnavailable as error:
                    yield what, str(error)
    yield f"{'decoder':26}{'three layers':19}{'auto':8}{_short(torch.float32):9}", _decoder_errors(device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(
    call: Call,
    specification: Call,
    inputs: Inputs,  # float64 and bool
    fixed: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Errors:
    """The errors of `call` in `dtype` on a device against `specification` in float64 on the same rounded inputs."""
    rounded = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in inputs.items()}
    exact = _outputs_and_gradients(specification, {k: _wide(x) for k, x in rounded.items()}, fixed, device)
    ours = _outputs_and_gradients(call, rounded, fixed, device)
    plain = _outputs_and_gradients(specification, rounded, fixed, device)
    slack = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    errors = []
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        errors += [_error(mine, right), ERROR_RATIO * _error(theirs, right) + slack]
    return Errors(*errors)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.double()


def _outputs_and_gradients(
    call: Call, inputs: Inputs, fixed: Mapping[str, Any], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, and the gradient of every input for one random gradient of the outputs."""
    leaves = {
        name: x.to(device) if x.dtype == torch.bool else x.to(device).requires_grad_() for name, x in inputs.items()
    }
    result = call(**leaves, **fixed)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, d_outputs))


def _error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, each tensor's in units of its largest element; NaN if there is one."""
    sizes = torch.stack([x.abs().max() for x in exact])
    differences = torch.stack([(a.double() - b).abs().max() for a, b in zip(ours, exact, strict=True)])
    return (differences / sizes.clamp(min=NEGLIGIBLE * sizes.max().item())).max().item()


def _decoder_errors(device: torch.device) -> Errors:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = DecoderConfig(d_model=64, nhead=2, num_layers=3, dim_feedforward=128)
    decoder = DabDecoder(config)
    inputs = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in decoder.named_parameters()}
    data = dict(
        content=torch.randn(2, 19, 64),
        memory=torch.randn(2, 45, 64),
        pos=torch.randn(1, 45, 64),
        anchors_unsigmoid=torch.randn(2, 19, 4),
    )
    torch.random.set_rng_state(torch_state)

    def fast(**x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(decoder, {k: x[k] for k in inputs}, (), {k: x[k] for k in data})

    def specification(**x: Tensor) -> tuple[Tensor, ...]:
        params = {k: x[k] for k in inputs}
        return reference.decode(params, config, x["content"], x["memory"], x["pos"], x["anchors_unsigmoid"])

    return compare(fast, specification, {k: x.double() for k, x in (inputs | data).items()}, {}, device, torch.float32)
