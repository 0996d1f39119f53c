"""What the predictions of `dab_fast.bench.predict` rest on. None of these is measured here: data sheets, published
measurements, and (where marked) estimates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str  # part of the device's name
    multiprocessors: int
    hbm: float  # bytes/s
    half: float  # FLOP/s of dense bf16 or fp16 products
    single: float  # FLOP/s of fp32 without tf32
    exponentials: float  # per second

    def peak(self, dtype: str) -> float:
        return self.single if dtype == "fp32" else self.half


GPUS = (
    Gpu("H100", multiprocessors=132, hbm=3.35e12, half=989e12, single=67e12, exponentials=3.7e12),
    Gpu("H200", multiprocessors=132, hbm=4.8e12, half=989e12, single=67e12, exponentials=3.7e12),
)

GRAPH_NODE = 1.3e-6  # seconds between dependent nodes of a CUDA graph
STREAM_LAUNCH = 2.3e-6  # seconds between dependent launches in a stream that is never empty
EAGER_CALL = 8e-6  # seconds of host per ATen call from Python, 6 to 12
OWN_CALL = 15e-6  # estimate: seconds of host per call of one of our Triton kernels from Python

ACHIEVABLE = 0.65  # estimate: the share of the peak that products of these widths reach when the GPU is full
DEPENDENT_STAGE = 0.8e-6  # estimate: seconds of a stage that waits for the one before, however little it computes
TILE = 64  # rows and columns of an output tile of a GEMM


def gpu(device_name: str) -> Gpu | None:
    return next((g for g in GPUS if g.name in device_name), None)
