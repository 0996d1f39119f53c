"""Every op on every backend that runs here, and the decoder, against the specification in float64.

A result passes if its error is at most twice that of the specification itself, run in plain PyTorch in the same dtype,
plus some roundings of the largest element: four in float32, where the sums of a fused kernel run in another order; one
in half precision, which only rounds a sum that ran in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dab_fast import measure, ops, reference
from dab_fast.decoder import DabDecoder
from dab_fast.info import build_info
from dab_fast.ops import _backends

ERROR_RATIO = 2.0
ROUNDINGS = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}
NEGLIGIBLE, GRADIENT_TOLERANCE = 1e-3, 1e-4  # of the decoder's gradients, as in its parity tests

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
    kernels: int | None = None  # launches of the package's own kernels in a forward; None: plain PyTorch was asked for

    @property
    def fine(self) -> bool:
        """Whether both errors are allowed and the kernels that were asked for did run."""
        right = self.output <= self.output_allowed and self.gradient <= self.gradient_allowed  # false for NaN
        return right and self.kernels != 0  # 0: the backend that was asked for did not run

    def __str__(self) -> str:
        launched = "" if self.kernels is None else f"  kernels {self.kernels}"
        return (
            f"output {self.output:.1e} (allowed {self.output_allowed:.1e})  "
            f"gradients {self.gradient:.1e} (allowed {self.gradient_allowed:.1e}){launched}"
        )


def run(device: torch.device, say: Callable[[str], None]) -> bool:
    """Says a verdict per line; returns whether all are fine."""
    say(f"dab_fast on {device}, torch {torch.__version__}: errors against float64, relative to the largest element")
    fine = True
    for what, result in verdicts(device):
        if isinstance(result, str):
            say(f"skip  {what}  {result}")
            continue
        fine = fine and result.fine
        say(f"{'ok  ' if result.fine else 'FAIL'}  {what}  {result}")
    say("every result is within its tolerance" if fine else "FAIL: a result is wrong")
    say(str(build_info()))
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
                        errors = compare(case.call, case.specification, case.inputs, case.fixed, device, dtype)
                        yield (
                            what,
                            errors if backend == "torch" else replace(errors, kernels=_kernels(case, device, dtype)),
                        )
                except _backends.BackendUnavailable as error:
                    yield what, str(error)
    yield f"{'decoder':26}{'three layers':19}{'auto':8}{_short(torch.float32):9}", _decoder_errors(device)


def _kernels(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    inputs = {name: x.to(device, x.dtype if x.dtype == torch.bool else dtype) for name, x in case.inputs.items()}
    return measure.kernel_launches(lambda: case.call(**inputs, **case.fixed))


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
    mine, theirs = ([_error(x, right) for x, right in zip(found, exact, strict=True)] for found in (ours, plain))
    allowed = [ERROR_RATIO * error + slack for error in theirs]
    return Errors(mine[0], allowed[0], mine[1], allowed[1])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.double()


def _outputs_and_gradients(
    call: Call, inputs: Inputs, fixed: Mapping[str, Any], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, and the gradient of every input for one random gradient of the outputs."""
    leaves = {name: x.detach().to(device) for name, x in inputs.items()}
    leaves = {name: x if x.dtype == torch.bool else x.requires_grad_() for name, x in leaves.items()}
    result = call(**leaves, **fixed)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(1)
    d_outputs = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, d_outputs))


def _error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, each tensor's in units of its largest element; NaN if there is one."""
    return _max_of((a.double() - b).abs().max() / b.abs().max() for a, b in zip(ours, exact, strict=True))


def _max_of(errors: Iterable[Tensor]) -> float:
    """The largest of some scalars; NaN if there is one, which Python's max would lose."""
    return torch.stack(list(errors)).max().item()


def _decoder_errors(device: torch.device) -> Errors:
    """`DabDecoder`, every parameter perturbed: fresh weights would move no box.

    Key biases have a zero gradient analytically, so a gradient is compared as a whole, and a negligible one with the
    largest: |difference| / max(|g|, 1e-3 * largest |g|).
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    decoder = DabDecoder(d_model=64, nhead=2, num_layers=3, dim_feedforward=128).requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    params = dict(decoder.named_parameters())
    data = dict(
        content=torch.randn(2, 19, 64),
        memory=torch.randn(2, 45, 64),
        pos=torch.randn(1, 45, 64),
        anchors_unsigmoid=torch.randn(2, 19, 4),
    )
    torch.random.set_rng_state(state)

    def fast(**x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(decoder, {k: x[k] for k in params}, (), {k: x[k] for k in data})

    def specification(**x: Tensor) -> tuple[Tensor, ...]:
        weights = {k: x[k] for k in params}
        return reference.decode(weights, decoder.config, x["content"], x["memory"], x["pos"], x["anchors_unsigmoid"])

    inputs = params | data
    outputs, gradients = _outputs_and_gradients(fast, inputs, {}, device)
    plain, _ = _outputs_and_gradients(specification, inputs, {}, device)
    exact, exact_gradients = _outputs_and_gradients(specification, {k: _wide(x) for k, x in inputs.items()}, {}, device)
    largest = max(g.norm().item() for g in exact_gradients)
    return Errors(
        output=_error(outputs, exact),
        output_allowed=ERROR_RATIO * _error(plain, exact) + ROUNDINGS[torch.float32] * torch.finfo(torch.float32).eps,
        gradient=_max_of(
            (ours - right).norm() / right.norm().clamp(min=NEGLIGIBLE * largest)
            for ours, right in zip(gradients, exact_gradients, strict=True)
        ),
        gradient_allowed=GRADIENT_TOLERANCE,
    )
