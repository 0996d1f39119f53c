"""A case: one workload in one mode, done by every provider that can, in turn, in one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dab_fast import measure
from dab_fast.accuracy import BENCHMARK_FLOOR, allowed, cotangents, gradient_errors, relu_flip
from dab_fast.bench import rows
from dab_fast.bench.counting import gradients
from dab_fast.bench.predict import floor_ms
from dab_fast.bench.providers import PROVIDERS, Provider
from dab_fast.bench.workloads import (
    DTYPES,
    FEATURE_MAPS,
    ONE_IMAGE,
    PAPER,
    TINY,
    WORKLOADS,
    Prepared,
    Shape,
    Size,
    Workload,
)
from dab_fast.ops import BackendUnavailable

logger = logging.getLogger("dab_fast")

MB = 1e6
HOST_CALLS = 20  # back to back, in a row of mode "host"; its times are of one
_NO_GRAD = ("inference", "forward", "host")
_WITH_RELU = ("decoder", "model")  # over so many units that one of them is always near zero


@dataclass(frozen=True)
class BenchmarkCase:
    kind: str
    mode: str
    shape: Shape = ONE_IMAGE
    dtype: str = "fp32"
    size: Size = PAPER
    without: tuple[str, ...] = ()  # providers left out

    def __str__(self) -> str:
        return f"{self.kind} {self.mode} {self.shape} {self.dtype}"

    def workload(self, device: torch.device) -> Workload:
        return WORKLOADS[self.kind](self.shape, DTYPES[self.dtype], device, self.size)

    def providers(self) -> list[Provider]:
        """Those that may take part, the baseline first."""
        return [
            p
            for p in PROVIDERS.values()
            if self.kind in p.kinds and p.name not in self.without and (p.modes is None or self.mode in p.modes)
        ]


@dataclass
class Result:
    rows: list[rows.Row] = field(default_factory=list)
    times: dict[str, measure.Times] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # provider: why it cannot
    failed: dict[str, BaseException] = field(default_factory=dict)  # provider: what it raised


@dataclass(frozen=True)
class _Runner:
    step: Callable[[], Any]  # what is timed
    evaluate: Callable[[], tuple[Tensor, dict[str, Tensor | None]]]  # the comparable output, and the gradients
    prepared: Prepared


def measure_case(
    case: BenchmarkCase,
    device: torch.device,
    *,
    rounds: int = 30,
    seconds: float = 10.0,  # of timed rounds
    rest: float = 0.0,  # before each timed call
    only: Iterable[str] | None = None,  # providers besides the baseline
) -> Result:
    """Measures every provider of the case: counts, memory and error first, then interleaved times."""
    result, work = Result(), case.workload(device)

    def interpreted(provider: Provider) -> bool:
        return device.type == "cpu" and provider.interpreted

    truth = _attempt(lambda: _runner(case, work, work.truth()).evaluate(), "float64", Result())
    runners: dict[str, _Runner] = {}
    facts: dict[str, rows.Row] = {}
    for provider in case.providers():
        name = provider.name
        if only is not None and name not in only and name != work.baseline:
            continue
        if (reason := provider.why_not(work)) is not None:
            result.skipped[name] = reason
            continue

        def prepare(provider: Provider = provider) -> tuple[_Runner, rows.Row]:
            runner = _runner(case, work, provider.build(work))
            errors = {} if truth is None else _errors(case, runner.evaluate(), truth)
            # The loss matches boxes, which must be numbers then.
            skip = interpreted(provider) and case.kind != "model"
            with measure.kernels_skipped() if skip else nullcontext():
                facts = _facts(case, runner, device, counted=not provider.compiled)
            return runner, {**errors, **facts}

        found = _attempt(prepare, name, result)
        if found is not None:
            runners[name], facts[name] = found
    if not runners:
        return result
    steps = {name: runner.step for name, runner in runners.items() if not interpreted(PROVIDERS[name])}
    result.times = measure.interleaved_times(
        steps, rounds, warmup=1 if device.type == "cpu" else 3, seconds=seconds, device=device, rest=rest
    )
    _fill_rows(case, work, device, facts, result)
    return result


def _attempt(fn: Callable[[], Any], name: str, result: Result) -> Any:
    """A provider that fails, runs out of memory, or cannot, does not end the others' case."""
    try:
        return fn()
    except BackendUnavailable as error:
        result.skipped[name] = str(error)
    except Exception as error:  # a peer may raise anything
        logger.warning("%s failed: %s: %s", name, type(error).__name__, str(error).partition("\n")[0])
        result.failed[name] = error
    return None


def _runner(case: BenchmarkCase, work: Workload, prepared: Prepared) -> _Runner:
    if case.mode in _NO_GRAD:

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return prepared.forward()

        def repeat() -> None:
            for _ in range(HOST_CALLS):
                infer()

        step = repeat if case.mode == "host" else infer
        return _Runner(step, lambda: (work.comparable(infer()), {}), prepared)

    kept = prepared.forward()
    given = cotangents(kept)
    if case.mode == "backward":

        def backward() -> dict[str, Tensor | None]:
            return gradients(prepared, kept, cotangent=given, retain_graph=True)

        return _Runner(backward, lambda: (work.comparable(kept), backward()), prepared)

    def train() -> dict[str, Tensor | None]:
        return gradients(prepared, prepared.forward(), cotangent=given)

    def evaluate() -> tuple[Tensor, dict[str, Tensor | None]]:
        outputs = prepared.forward()
        comparable = work.comparable(outputs)
        return comparable, gradients(prepared, outputs, cotangent=given)

    return _Runner(train, evaluate, prepared)


def _facts(case: BenchmarkCase, runner: _Runner, device: torch.device, *, counted: bool) -> rows.Row:
    """Memory and counts: in the interpreter without its results."""
    if case.mode == "host":
        return {}
    if not counted:
        return {"peak_mb": measure.peak_bytes(runner.step, device) / MB} if device.type == "cuda" else {}
    counted_once: list[measure.Counts] = []
    peak = measure.peak_bytes(lambda: counted_once.append(measure.count(runner.step)), device)
    (counts,) = counted_once
    found: rows.Row = {
        "peak_mb": peak / MB,
        "aten_calls": counts.aten.total(),
        "kernel_launches": counts.kernels.total(),
        "host_syncs": counts.syncs.total(),
    }
    if case.mode in ("training", "both"):
        found["saved_mb"] = measure.saved_bytes(runner.prepared.forward, runner.prepared.parameters()) / MB
    return found


def _errors(
    case: BenchmarkCase,
    ours: tuple[Tensor, dict[str, Tensor | None]],
    truth: tuple[Tensor, dict[str, Tensor | None]],
) -> rows.Row:
    """Of the output the largest, relative to the truth's scale; where there are gradients, of those instead: the
    median over what gets one, and the worst. Boxes are in [0, 1] and stay as they are.
    """
    if not truth[1]:
        scale = 1.0 if case.kind in ("decoder", "model") else truth[0].abs().max().item()
        return {"error": ((ours[0] - truth[0]).abs().max() / scale).item()}
    errors = gradient_errors(ours[1], truth[1])
    every = torch.tensor(list(errors.values()), dtype=torch.float64)  # whose median and maximum are NaN if one is
    return {"error": every.median().item(), "worst_error": every.max().item()}


def _accurate(case: BenchmarkCase, found: rows.Row, peer: rows.Row) -> bool:
    """The gate: the error, and that of the worst gradient where there are any."""
    good = accurate(found.get("error"), peer.get("error"), case.dtype)
    if "worst_error" not in found:
        return good
    units = case.size.d_model * case.shape.batch * case.shape.queries
    flip = relu_flip(units) if case.kind in _WITH_RELU else 0.0
    return good and accurate(found["worst_error"], peer.get("worst_error"), case.dtype, flip)


def accurate(error: float | None, peer_error: float | None, dtype: str, more: float = 0.0) -> bool:
    """Whether an error against float64 is within the rule where the baseline stands for plain PyTorch."""
    if error is None or peer_error is None:
        return False
    return error <= allowed(peer_error, BENCHMARK_FLOOR[DTYPES[dtype]] + more)


def _fill_rows(
    case: BenchmarkCase,
    work: Workload,
    device: torch.device,
    facts: dict[str, rows.Row],
    result: Result,
) -> None:
    place = rows.where(device)
    floor = floor_ms(case.kind, case.mode, case.shape, case.dtype, place["device"], case.size)
    peer = facts.get(work.baseline, {})
    baseline = result.times.get(work.baseline)
    ms = 1e3 / HOST_CALLS if case.mode == "host" else 1e3
    for name, known in facts.items():
        good = _accurate(case, known, peer)
        timed: rows.Row = {}
        if (times := result.times.get(name)) is not None:
            p20, p50, p80 = (times.quantile(q) * ms for q in (0.2, 0.5, 0.8))
            timed = {
                "p20_ms": p20,
                "p50_ms": p50,
                "p80_ms": p80,
                "wall_p50_ms": measure.quantile(times.wall, 0.5) * ms,
                "rounds": len(times.wall),
                "speedup": baseline.quantile(0.5) * ms / p50 if good and baseline is not None else None,
                "floor_ms": floor,
                "floor_pct": None if floor is None else 100 * floor / p50,
            }
        result.rows.append(
            {
                "op": case.kind,
                "mode": case.mode,
                "provider": name,
                "batch": case.shape.batch,
                "queries": case.shape.queries,
                "tokens": case.shape.tokens,
                "padded": case.shape.padded,
                "dtype": case.dtype,
                **timed,
                **known,
                "peer_error": peer.get("error"),
                "accurate": good,
                **place,
            }
        )


def cases(device: torch.device, level: str = "default") -> list[BenchmarkCase]:
    """What is measured: "tiny" is for smoke tests, "default" ends within five minutes, "full" is everything."""
    if level == "tiny":
        return _tiny()
    if level == "full":
        return _full(device)
    return _default_cuda() if device.type == "cuda" else _default_cpu()


def _shape(tokens: int, batch: int = 1, **more: Any) -> Shape:
    height, width = FEATURE_MAPS[tokens]
    return Shape(batch, height=height, width=width, **more)


def _tiny() -> list[BenchmarkCase]:
    small = Shape(batch=2, queries=9, height=5, width=7)
    padded = Shape(batch=2, queries=9, height=6, width=7, padded=True)
    return [
        BenchmarkCase(kind, mode, shape, size=TINY, without=("compile", "compile_max"))
        for kind, workload in WORKLOADS.items()
        for mode in workload.modes
        for shape in ((small,) if kind in ("box_position_embed", "refine_boxes", "model") else (small, padded))
    ]


def _host() -> list[BenchmarkCase]:
    """Calls so small that the host's work is all there is."""
    return [
        BenchmarkCase(kind, "host", Shape(queries=4, height=2, width=4), without=("compile", "compile_max", "flex"))
        for kind in ("modulated_cross_attention", "box_position_embed", "refine_boxes")
    ]


def _default_cpu() -> list[BenchmarkCase]:
    image = Shape(height=10, width=13)  # 320 x 416
    slow = ("compile",)  # a minute of compilation for each decoder
    return [
        BenchmarkCase("decoder", "inference", _shape(1050)),
        BenchmarkCase("decoder", "inference", _shape(4200), without=slow),
        BenchmarkCase("decoder", "inference", _shape(1050, 2, padded=True), without=slow),
        BenchmarkCase("decoder", "inference", _shape(1050), "bf16", without=slow),
        BenchmarkCase("decoder", "training", _shape(1050), without=slow),
        BenchmarkCase("model", "inference", image),
        BenchmarkCase("model", "training", image),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(1050)),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(4200), without=slow),
        BenchmarkCase("modulated_cross_attention", "both", _shape(1050), without=slow),
        *(
            BenchmarkCase(kind, mode, _shape(1050), without=slow if mode == "both" else ())
            for kind in ("box_position_embed", "refine_boxes")
            for mode in ("forward", "both")
        ),
        *_host(),
    ]


def _default_cuda() -> list[BenchmarkCase]:
    """Ordered by worth: a run that is cut short has the figures that matter most. Compiling a decoder takes from half
    a minute to minutes, so it is compiled for three cases, and tuned for one."""
    eager, untuned = ("compile", "compile_max"), ("compile_max",)
    return [
        BenchmarkCase("decoder", "inference", _shape(1050), "bf16"),
        BenchmarkCase("decoder", "training", _shape(1050, 2), "bf16", without=untuned),
        BenchmarkCase("decoder", "inference", _shape(4200), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(1050, 8), "bf16", without=untuned),
        BenchmarkCase("decoder", "inference", _shape(1050, 32), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(4200, 8), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(1050), without=eager),
        BenchmarkCase("decoder", "training", _shape(1050, 2), without=eager),
        BenchmarkCase("decoder", "training", _shape(4200, 2), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(1050), "fp16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(1050, 2, padded=True), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(1050, queries=900), "bf16", without=eager),
        BenchmarkCase("decoder", "inference", _shape(4200, 32), "bf16", without=eager),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(1050), "bf16", without=untuned),
        BenchmarkCase("modulated_cross_attention", "both", _shape(1050, 2), "bf16", without=untuned),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(4200, 8), "bf16", without=untuned),
        BenchmarkCase("modulated_cross_attention", "backward", _shape(4200, 8), "bf16", without=untuned),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(1050, 2, padded=True), "bf16", without=untuned),
        BenchmarkCase("modulated_cross_attention", "forward", _shape(1050), without=eager),
        BenchmarkCase("modulated_cross_attention", "both", _shape(1050, 2), without=eager),
        *(
            BenchmarkCase(kind, mode, _shape(1050, batch), "bf16", without=untuned)
            for kind in ("box_position_embed", "refine_boxes")
            for mode, batch in (("forward", 1), ("both", 2), ("forward", 32))
        ),
        BenchmarkCase("model", "inference", _shape(1050), "bf16"),
        BenchmarkCase("model", "training", _shape(1050, 2)),
        BenchmarkCase("model", "inference", _shape(1050)),
        BenchmarkCase("model", "inference", _shape(1050, 8)),
        BenchmarkCase("model", "inference", _shape(1050, 32), "bf16"),
        BenchmarkCase("model", "training", _shape(1050, 8), "bf16"),
        *_host(),
    ]


def _full(device: torch.device) -> list[BenchmarkCase]:
    batches = (1, 2, 8, 32) if device.type == "cuda" else (1, 2)
    shapes = [
        *(_shape(tokens, batch) for tokens in FEATURE_MAPS for batch in batches),
        _shape(1050, 2, padded=True),
        _shape(1050, 1, queries=900),
    ]
    return [
        BenchmarkCase(kind, mode, shape, dtype)
        for kind, workload in WORKLOADS.items()
        for mode in workload.modes
        for shape in shapes
        for dtype in DTYPES
    ] + _host()
