"""Predicted times of the decoder, and the floor below which no implementation of the same mathematics can be.

A stage's work is its floating point operations, the bytes it must move once, and its exponentials. Its time is the
longest of the three on the part of the GPU that its tiles fill, plus what a launch costs. The floor assumes every
stage overlapped with every other but for their order: the longest of all operations, all bytes, all exponentials,
and the dependent stages one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dab_fast.bench import hardware
from dab_fast.bench.hardware import Gpu
from dab_fast.bench.workloads import PAPER, Shape, Size

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Stage:
    name: str
    times: int  # in one forward
    flops: float  # of one time
    bytes: float
    tiles: int
    exponentials: float = 0.0
    dependent: bool = True  # waits for the stage before it; False: can run beside others

    def seconds(self, gpu: Gpu, dtype: str) -> float:
        """Of one time, without its launch."""
        filled = min(1.0, self.tiles / gpu.multiprocessors)
        return max(
            self.flops / (gpu.peak(dtype) * hardware.ACHIEVABLE * filled),
            self.bytes / gpu.hbm,
            self.exponentials / (gpu.exponentials * filled),
        )


def decoder_stages(shape: Shape, size: Size = PAPER, dtype: str = "bf16") -> list[Stage]:
    """The stages of a forward after the rewritings; without padding the position keys come from h + w rows."""
    rows, tokens = shape.batch * shape.queries, shape.batch * shape.tokens
    d, layers, heads, width = size.d_model, size.layers, size.nhead, BYTES[dtype]

    def gemm(name: str, m: int, n: int, k: int, times: int, *, dependent: bool = True, dtype: str = dtype) -> Stage:
        tiles = math.ceil(m / hardware.TILE) * math.ceil(n / hardware.TILE)
        moved = BYTES[dtype] * (m * k + n * k + m * n)
        return Stage(name, times, 2 * m * n * k, moved, tiles, dependent=dependent)

    def attention(name: str, keys: int, logit_width: int, batch_of_k_pos: int, times: int) -> Stage:
        flops = 2 * shape.batch * heads * shape.queries * keys * (logit_width + d // heads)
        moved = width * (2 * rows * d + 2 * shape.batch * keys * d + rows * d + batch_of_k_pos * keys * d)
        tiles = shape.batch * heads * math.ceil(shape.queries / hardware.TILE)
        return Stage(name, times, flops, moved, tiles, exponentials=shape.batch * heads * shape.queries * keys)

    pos_rows = tokens if shape.padded else shape.height + shape.width
    head = d // heads
    return [
        gemm("keys and values of all layers", tokens, 2 * layers * d, d, 1, dependent=False),
        gemm("position keys of all layers", pos_rows, layers * d, d, 1, dependent=False),
        Stage("box_position_embed", layers, 0, 4 * rows * 4 + width * rows * 3 * d, math.ceil(rows / 4)),
        gemm("ref_point_head 1", rows, d, 2 * d, layers),
        gemm("ref_point_head 2", rows, d, d, layers),
        gemm("self-attention q, k, v", rows, 3 * d, 2 * d, layers),
        attention("self-attention", shape.queries, head, 0, layers),
        gemm("self-attention out, norm", rows, d, d, layers),
        gemm("cross-attention q", rows, 2 * d, d, layers),
        attention("cross-attention", shape.tokens, 2 * head, shape.batch if shape.padded else 1, layers),
        gemm("cross-attention out, norm", rows, d, d, layers),
        gemm("FFN 1", rows, size.ffn, d, layers),
        gemm("FFN 2, norm", rows, d, size.ffn, layers),
        gemm("query_scale, ref_anchor_head 1", rows, 2 * d, d, layers),
        gemm("query_scale, ref_anchor_head 2", rows, d + 2, d, layers),
        gemm("refine_boxes", rows, 2 * d + 4, d, layers - 1, dtype="fp32"),
    ]


def floor_seconds(stages: Iterable[Stage], gpu: Gpu, dtype: str) -> float:
    """No schedule of these stages is faster: see the module's docstring."""
    stages = list(stages)
    return max(
        sum(s.times * s.flops for s in stages) / (gpu.peak(dtype) * hardware.ACHIEVABLE),
        sum(s.times * s.bytes for s in stages) / gpu.hbm,
        sum(s.times * s.exponentials for s in stages) / gpu.exponentials,
        sum(s.times for s in stages if s.dependent) * hardware.DEPENDENT_STAGE,
    )


def graph_seconds(stages: Iterable[Stage], gpu: Gpu, dtype: str) -> float:
    """The stages one after the other as nodes of a CUDA graph."""
    return sum(s.times * (hardware.GRAPH_NODE + s.seconds(gpu, dtype)) for s in stages)


def eager_seconds(stages: Iterable[Stage], gpu: Gpu, dtype: str, aten_calls: int, kernel_launches: int) -> float:
    """Launched one by one from Python: the host's time or the GPU's, whichever is longer."""
    host = aten_calls * hardware.EAGER_CALL + kernel_launches * hardware.OWN_CALL
    launches = (aten_calls + kernel_launches) * hardware.STREAM_LAUNCH
    return max(host, launches + sum(s.times * s.seconds(gpu, dtype) for s in stages))


TRAINING = 3  # a forward and a backward of twice its work


def floor_ms(kind: str, mode: str, shape: Shape, dtype: str, device_name: str, size: Size = PAPER) -> float | None:
    """The floor of a case on a known GPU; None for the whole model, for other devices, and for host times."""
    gpu = hardware.gpu(device_name)
    parts = {"modulated_cross_attention": "cross-attention", "box_position_embed": kind, "refine_boxes": kind}
    if gpu is None or mode == "host" or kind not in ("decoder", *parts):
        return None
    stages = decoder_stages(shape, size, dtype)
    if kind in parts:
        stages = [Stage(**{**vars(s), "times": 1}) for s in stages if s.name == parts[kind]]
    work = {"training": TRAINING, "both": TRAINING, "backward": TRAINING - 1}.get(mode, 1)
    return 1e3 * work * floor_seconds(stages, gpu, dtype)
