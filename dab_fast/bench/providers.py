"""Who does the work: the original, the peers, and each backend of ours. To add a provider, add one entry."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dab_fast import ops
from dab_fast.bench.workloads import WORKLOADS, Op, Prepared, Workload, within
from dab_fast.ops import _backends

_OPS = tuple(kind for kind, workload in WORKLOADS.items() if issubclass(workload, Op))

WhyNot = Callable[[Workload], "str | None"]


@dataclass(frozen=True)
class Provider:
    name: str
    what: str
    build: Callable[[Workload], Prepared]
    why_not: WhyNot = lambda work: None  # why it cannot do this work here, or None
    ours: bool = False
    kinds: tuple[str, ...] = tuple(WORKLOADS)  # of workloads
    modes: tuple[str, ...] | None = None  # only these modes; None: every one
    counted: bool = False  # part of `python -m benchmarks.counts`
    compiled: bool = False  # its calls cannot be counted without recompiling
    interpreted: bool = False  # on a CPU, where its times mean nothing


def _original(work: Workload) -> Prepared:
    return work.original()


def _sdpa(work: Workload) -> Prepared:
    return work.sdpa()


def _compiled(build: Callable[[Workload], Prepared], **options: Any) -> Callable[[Workload], Prepared]:
    def compiled(work: Workload) -> Prepared:
        torch._dynamo.reset()
        prepared = build(work)
        forward = torch.compile(prepared.forward, dynamic=False, **options)
        if options.get("mode") != "max-autotune":
            return replace(prepared, forward=forward)

        def step() -> tuple[Tensor, ...]:
            torch.compiler.cudagraph_mark_step_begin()
            return forward()

        return replace(prepared, forward=step)

    return compiled


def _ours(backend: str, **options: Any) -> Callable[[Workload], Prepared]:
    def build(work: Workload) -> Prepared:
        return within(work.ours(**options), lambda: ops.backend(backend))

    return build


def _needs_cuda(work: Workload) -> str | None:
    return None if work.device.type == "cuda" else "needs a CUDA GPU"


def _needs_inductor(work: Workload) -> str | None:
    if work.device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler found"


def _backend(name: str) -> WhyNot:
    """Every op must run on the backend: a mixture would measure something else."""

    def why_not(work: Workload) -> str | None:
        with ops.backend(name):
            if ops.chosen_backend() != name:
                return f"{_backends.VARIABLE}={ops.chosen_backend()} is set"
        needed = () if name == "auto" else (work.kind,) if isinstance(work, Op) else _OPS
        for op in needed:
            if name == "triton" and importlib.util.find_spec(f"dab_fast.backends.{name}.{op}") is None:
                return f"there is no Triton kernel of {op}"
            if (reason := _backends.why_not(name, op, work.device)) is not None:
                return reason
        return None

    return why_not


def _all(*reasons: WhyNot) -> WhyNot:
    return lambda work: next((found for reason in reasons if (found := reason(work)) is not None), None)


PROVIDERS = {
    p.name: p
    for p in (
        Provider(
            "huggingface", "Hugging Face transformers, eager", _original, kinds=("decoder", "model"), counted=True
        ),
        Provider("eager", "the op's specification in plain PyTorch", _original, kinds=_OPS),
        Provider(
            "sdpa",
            "the same with F.scaled_dot_product_attention patched in",
            _sdpa,
            kinds=("decoder", "model", "modulated_cross_attention"),
        ),
        Provider(
            "compile",
            "torch.compile of eager",
            _compiled(_original),
            _needs_inductor,
            kinds=("decoder", *_OPS),
            compiled=True,
        ),
        Provider(
            "compile_max",
            "torch.compile of eager, max-autotune with CUDA graphs",
            _compiled(_original, mode="max-autotune"),
            _all(_needs_cuda, _needs_inductor),
            kinds=("decoder", *_OPS),
            compiled=True,
        ),
        Provider(
            "flex",
            "compiled FlexAttention of concatenated parts",
            lambda work: work.flex(),  # type: ignore[attr-defined]
            _all(_needs_cuda, _needs_inductor),
            kinds=("modulated_cross_attention",),
            compiled=True,
        ),
        Provider("torch", "dab_fast in plain PyTorch", _ours("torch"), _backend("torch"), ours=True, counted=True),
        Provider(
            "triton",
            "dab_fast, Triton kernels",
            _ours("triton"),
            _backend("triton"),
            ours=True,
            counted=True,
            interpreted=True,
        ),
        Provider(
            "triton_recompute",
            "the same, keeping only the layers' inputs for backward",
            _ours("triton", recompute=True),
            _backend("triton"),
            ours=True,
            kinds=("decoder", "model"),
            modes=("training",),
            counted=True,
            interpreted=True,
        ),
        Provider(
            "auto",
            "dab_fast as it comes: each op on the best backend that is trusted here",
            _ours("auto"),
            _backend("auto"),
            ours=True,
            kinds=("decoder", "model"),
        ),
        Provider("native", "dab_fast, C++ and CUDA extension", _ours("native"), _backend("native"), ours=True),
    )
}
