"""Host time of the public ops on a CPU, the extension against plain PyTorch: python -m benchmarks.native_cpu

B images of Q = 300 queries, D = 256, float32; forward without gradients, and forward with backward. Both backends in
turn on the same inputs, once their results agree. Microseconds: p20 / p50 / p80.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dab_fast import build_info, measure, ops

QUERIES, WIDTH = 300, 256


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def cases(batch: int) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each op and its inputs."""
    rows, d = (batch, QUERIES), WIDTH
    embed = leaves((*rows, 4), (*rows, d), (*rows, 2))
    refine = leaves((*rows, d), (*rows, 4), (d, d), (d,), (d, d), (d,), (4, d), (4,))
    with torch.no_grad():
        for boxes in (embed[0], refine[1]):
            boxes.uniform_(0.05, 0.95)
        for weight in refine[2:]:
            weight /= d**0.5
    return {
        "box_position_embed": (ops.box_position_embed, embed),
        "refine_boxes": (lambda *tensors: ops.refine_boxes(*tensors, eps=1e-3), refine),
    }


def with_backend(name: str, fn: Callable[..., Any], inputs: list[Tensor], gradients: list[Tensor] | None) -> Any:
    with ops.backend(name):
        if gradients is None:
            with torch.no_grad():
                return fn(*inputs)
        results = fn(*inputs)
        return torch.autograd.grad(results, inputs, gradients)


def compare(batch: int, seconds: float) -> None:
    for op, (fn, inputs) in cases(batch).items():
        results = with_backend("torch", fn, inputs, None)
        results = results if isinstance(results, tuple) else (results,)
        gradients = [torch.randn_like(x) for x in results]
        for mode, given in (("forward", None), ("forward and backward", gradients)):
            calls = {name: partial(with_backend, name, fn, inputs, given) for name in ("native", "torch")}
            torch.testing.assert_close(calls["native"](), calls["torch"](), rtol=1e-3, atol=1e-3)
            times = measure.interleaved_times(calls, 10**6, warmup=10, seconds=seconds)
            cells = {name: [1e6 * t.quantile(q) for q in (0.2, 0.5, 0.8)] for name, t in times.items()}
            text = "   ".join(f"{name} {p20:7.0f} / {p50:7.0f} / {p80:7.0f}" for name, (p20, p50, p80) in cells.items())
            ratio = cells["torch"][0] / cells["native"][0]
            print(f"B{batch} {op:18} {mode:20} {text}   torch / native at p20: {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    arguments = parser.parse_args()
    print(build_info())
    torch.manual_seed(0)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        for batch in arguments.batch:
            compare(batch, arguments.seconds)


if __name__ == "__main__":
    main()
