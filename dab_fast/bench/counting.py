"""Launches, host syncs and kept bytes of a provider's decoder and model; the same on every machine with the same
libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dab_fast import accuracy, measure
from dab_fast.backends.torch.modulated_cross_attention import SCORES_AT_ONCE
from dab_fast.bench.providers import PROVIDERS, Provider
from dab_fast.bench.workloads import FEATURE_MAPS, PAPER, Decoder, Model, Prepared, Shape, Size, Workload
from dab_fast.parts.folding import WORDS_AT_ONCE

METRICS = ("aten_calls", "kernel_launches", "host_syncs", "saved_bytes")


def gradients(
    prepared: Prepared, outputs: tuple[Tensor, ...], *, retain_graph: bool = False, cotangent: list[Tensor]
) -> dict[str, Tensor | None]:
    """Of every leaf, by name; None where it has none."""
    with prepared.around():
        return accuracy.gradients(outputs, prepared.leaves, cotangent, allow_unused=True, retain_graph=retain_graph)


def count_modes(work: Workload, provider: Provider, *, run_kernels: bool = False) -> dict[str, dict[str, int]]:
    """{mode: {metric: number}} of one provider; Triton kernels are counted, and run only where asked for."""
    prepared = provider.build(work)
    found: dict[str, dict[str, int]] = {}
    for mode in provider.modes or ("inference", "training"):
        training = mode == "training"
        with torch.set_grad_enabled(training), nullcontext() if run_kernels else measure.kernels_skipped():
            prepared.forward()  # what only the first call does

        def step(training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                outputs = prepared.forward()
            if training:
                given = _zero_cost_cotangents(outputs)
                gradients(prepared, outputs, cotangent=given)

        counts = measure.count(step, execute_kernels=run_kernels)
        kept = 0
        if training:
            kept = measure.saved_bytes(prepared.forward, prepared.parameters(), execute_kernels=run_kernels)
        numbers = (counts.aten.total(), counts.kernels.total(), counts.syncs.total(), kept)
        found[mode] = dict(zip(METRICS, numbers, strict=True))
    return found


def _zero_cost_cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """An allocation and no call that computes: the gradients come from elsewhere in real training."""
    return [torch.empty_like(x) for x in outputs]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Takes at once what a GPU would be given at once."""
    with ExitStack() as stack:
        for at_once in (SCORES_AT_ONCE, WORDS_AT_ONCE):
            stack.enter_context(mock.patch.dict(at_once, cpu=at_once["gpu"]))
        yield


def decoder_counts(tokens: tuple[int, ...] = tuple(FEATURE_MAPS), size: Size = PAPER) -> dict[str, dict[str, Any]]:
    """{tokens: {provider: {mode: {metric: number}}}} of the decoder at B = 1, fp32; as a GPU would be asked."""
    counts: dict[str, dict[str, Any]] = {}
    for s in tokens:
        height, width = FEATURE_MAPS[s]
        work = Decoder(Shape(height=height, width=width), size=size)
        with _as_on_a_gpu():
            counts[str(s)] = {
                p.name: count_modes(work, p) for p in PROVIDERS.values() if p.counted and p.why_not(work) is None
            }
    return counts


def model_counts(size: Size = PAPER) -> dict[str, dict[str, dict[str, int]]]:
    """{provider: {mode: {metric: number}}} of the whole model, and of its training step with the loss of all layers.

    On two images of 128 x 160 and with 20 queries, enough for the fused attention: more would change the kept bytes
    alone. The kernels run, since the loss matches boxes, which must be numbers.
    """
    work = Model(Shape(batch=2, queries=20, height=4, width=5), size=size)
    with _as_on_a_gpu():
        return {
            p.name: count_modes(work, p, run_kernels=True)
            for p in PROVIDERS.values()
            if p.counted and "model" in p.kinds and p.why_not(work) is None
        }


def not_counted(device: torch.device) -> dict[str, str]:
    """Providers that should be counted but cannot be here, and why."""
    work = Decoder(device=device)
    return {p.name: reason for p in PROVIDERS.values() if p.counted and (reason := p.why_not(work)) is not None}
