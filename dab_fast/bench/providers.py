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
from dab_fast.bench.workloads import Op, Prepared, Workload
from dab_fast.ops import _backends

WhyNot = Callable[[Workload], "str | None"]


@dataclass(frozen=True)
class Provider:
    name: str
    what: str
    build: Callable[[Workload], Prepared]
    why_not: WhyNot = lambda work: None  # why it cannot do this work here, or None
    ours: bool = False
    modes: tuple[str, ...] | None = None  # only these modes; None: every one
    counted: bool = False  # part of `python -m benchmarks.counts`


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


def _ours(backend: str) -> Callable[[Workload], Prepared]:
    def build(work: Workload) -> Prepared:
        prepared = work.ours()

        def forward() -> tuple[Tensor, ...]:
            with ops.backend(backend):
                return prepared.forward()

        return replace(prepared, forward=forward)

    return build


def _not_for(*kinds: str) -> WhyNot:
    return lambda work: f"does not exist for {work.kind}" if work.kind in kinds else None


def _only_for(*kinds: str) -> WhyNot:
    return lambda work: None if work.kind in kinds else f"exists for {', '.join(kinds)} only"


def _needs_cuda(work: Workload) -> str | None:
    return None if work.device.type == "cuda" else "needs a CUDA GPU"


def _needs_inductor(work: Workload) -> str | None:
    if work.device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler found"


def _can_compile_dtype(work: Workload) -> str | None:
    if work.kind == "model":
        return "the whole model is measured as its users run it, uncompiled"
    return None


def _backend(name: str) -> WhyNot:
    """Every op must run on the backend: a mixture would measure something else."""

    def why_not(work: Workload) -> str | None:
        with ops.backend(name):
            if ops.chosen_backend() != name:
                return f"{_backends.VARIABLE}={ops.chosen_backend()} is set"
        needed = [work.kind] if isinstance(work, Op) else _OPS
        for op in needed:
            if name != "torch" and importlib.util.find_spec(f"{_backends.PACKAGES[name]}.{op}") is None:
                return f"there is no {name} kernel of {op}"
            if (reason := _backends.why_not(name, op, work.device)) is not None:
                return reason
        return None

    return why_not


_OPS = ("box_position_embed", "modulated_cross_attention", "refine_boxes")


def _all(*reasons: WhyNot) -> WhyNot:
    return lambda work: next((found for reason in reasons if (found := reason(work)) is not None), None)


PROVIDERS = {
    p.name: p
    for p in (
        Provider(
            "huggingface",
            "Hugging Face transformers, eager",
            _original,
            _only_for("decoder", "model"),
            counted=True,
        ),
        Provider("eager", "the op's specification in plain PyTorch", _original, _not_for("decoder", "model")),
        Provider(
            "sdpa",
            "the same with F.scaled_dot_product_attention patched in",
            _sdpa,
            _not_for("box_position_embed", "refine_boxes"),
        ),
        Provider("compile", "torch.compile of eager", _compiled(_original), _all(_can_compile_dtype, _needs_inductor)),
        Provider(
            "compile_max",
            "torch.compile of eager, max-autotune with CUDA graphs",
            _compiled(_original, mode="max-autotune"),
            _all(_can_compile_dtype, _needs_cuda, _needs_inductor),
        ),
        Provider(
            "flex",
            "compiled FlexAttention of concatenated parts",
            lambda work: work.flex(),  # type: ignore[attr-defined]
            _all(_only_for("modulated_cross_attention"), _needs_cuda, _needs_inductor),
        ),
        Provider("torch", "dab_fast in plain PyTorch", _ours("torch"), _backend("torch"), ours=True, counted=True),
        Provider("triton", "dab_fast, Triton kernels", _ours("triton"), _backend("triton"), ours=True, counted=True),
        Provider("native", "dab_fast, C++ and CUDA extension", _ours("native"), _backend("native"), ours=True),
    )
}
