"""Every op on every backend that runs here, and the decoder, by the rule of `dab_fast.accuracy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dab_fast import measure, reference
from dab_fast.accuracy import (
    GRADIENT_TOLERANCE,
    Error,
    errors,
    gradient_errors,
    outputs_and_gradients,
    root_of_squares,
)
from dab_fast.decoder import DabDecoder
from dab_fast.info import build_info
from dab_fast.ops import _backends
from dab_fast.ops._examples import Example, examples

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """The worst error of the outputs and that of the gradients."""

    output: Error
    gradient: Error
    kernels: int | None = None  # launches of the package's own kernels in a forward; None: plain PyTorch was asked for

    @property
    def fine(self) -> bool:
        """Whether both errors are allowed and the kernels that were asked for did run."""
        return self.output.fine and self.gradient.fine and self.kernels != 0

    def __str__(self) -> str:
        launched = "" if self.kernels is None else f"  kernels {self.kernels}"
        return (
            f"output {self.output.size:.1e} (allowed {self.output.allowed:.1e})  "
            f"gradients {self.gradient.size:.1e} (allowed {self.gradient.allowed:.1e}){launched}"
        )


def run(device: torch.device, say: Callable[[str], None]) -> bool:
    """Says a verdict per line; returns whether all are fine."""
    say(f"dab_fast on {device}, torch {torch.__version__}: errors against float64, relative")
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


def verdicts(device: torch.device) -> Iterator[tuple[str, Verdict | str]]:
    """What was tested, and its errors, or why it cannot run here."""
    skipped = set()
    for example in examples():
        for backend in _backends.BACKENDS:
            reason = _backends.why_not(backend, example.op, device)
            if reason is not None:
                if (example.op, backend) not in skipped:
                    skipped.add((example.op, backend))
                    yield f"{example.op:26}{'':19}{backend:8}", reason
                continue
            for dtype in DTYPES:
                what = f"{example.op:26}{example.variant:19}{backend:8}{_short(dtype):9}"
                try:
                    with _backends.backend(backend):
                        verdict = compare(example, device, dtype)
                        if backend != "torch":
                            verdict = replace(verdict, kernels=_kernels(example, device, dtype))
                        yield what, verdict
                except _backends.BackendUnavailable as error:
                    yield what, str(error)
    yield f"{'decoder':26}{'three layers':19}{'auto':8}{_short(torch.float32):9}", _decoder_verdict(device)


def _kernels(example: Example, device: torch.device, dtype: torch.dtype) -> int:
    inputs = example.rounded(dtype, device)
    return measure.kernel_launches(lambda: example.call(**inputs, **example.fixed))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(example: Example, device: torch.device, dtype: torch.dtype) -> Verdict:
    """An op in `dtype` on a device, and its specification in float64 on the same rounded inputs."""
    inputs = example.rounded(dtype, device)
    specification = example.positional(example.specification)
    found = errors(
        outputs_and_gradients(example.positional(example.call), inputs),
        outputs_and_gradients(specification, inputs, dtype=torch.float64),
        outputs_and_gradients(specification, inputs),
        root_of_squares(specification, inputs),
        truncated=_backends.chosen_backend() == "triton" and device.type == "cpu",
    )
    return Verdict(_worst(found, "out"), _worst(found, "d_"))


def _worst(found: Mapping[str, Error], kind: str) -> Error:
    """Of the outputs, or of the gradients."""
    return max((error for name, error in found.items() if name.startswith(kind)), key=lambda error: error.badness)


def _decoder_verdict(device: torch.device) -> Verdict:
    """Of two draws: in one of a hundred a unit of a relu is within rounding of zero, where float32 may turn it over
    and a gradient then differs by more than is allowed. What is wrong is wrong in both."""
    first = _verdict_of_a_decoder(device, seed=0)
    return first if first.fine else _verdict_of_a_decoder(device, seed=1)


def _verdict_of_a_decoder(device: torch.device, seed: int) -> Verdict:
    """`DabDecoder`, every parameter perturbed: fresh weights would move no box."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
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

    names = (*params, *data)

    def fast(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(decoder, {k: x[k] for k in params}, (), {k: x[k] for k in data})

    def specification(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(names, tensors, strict=True))
        weights = {k: x[k] for k in params}
        return reference.decode(weights, decoder.config, x["content"], x["memory"], x["pos"], x["anchors_unsigmoid"])

    inputs = {name: x.to(device) for name, x in (params | data).items()}
    ours, own = (outputs_and_gradients(call, inputs) for call in (fast, specification))
    exact = outputs_and_gradients(specification, inputs, dtype=torch.float64)
    wanted = [f"d_{name}" for name in inputs]
    of_gradients = gradient_errors({name: ours[name] for name in wanted}, {name: exact[name] for name in wanted})
    worst = torch.tensor(list(of_gradients.values())).max().item()  # NaN if one is
    return Verdict(_worst(errors(ours, exact, own), "out"), Error(worst, GRADIENT_TOLERANCE))
