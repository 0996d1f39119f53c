"""Predicted, not measured: python -m benchmarks.predict [--gpu H100] [--stages] [--json] [--results FOLDER]

The decoder's forward in bf16: bytes, operations, dependent stages and time per stage and in total, for each provider
of ours, the floor, and beside them what was measured on that GPU where the results have it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.counts import BASELINE
from dab_fast.bench import hardware, rows
from dab_fast.bench.hardware import Gpu
from dab_fast.bench.predict import decoder_stages, eager_seconds, floor_seconds, graph_seconds
from dab_fast.bench.workloads import FEATURE_MAPS, Shape

RESULTS = Path(__file__).with_name("results")
BATCHES = (1, 8, 32)


def predict(gpu: Gpu, dtype: str = "bf16") -> list[dict[str, Any]]:
    """Milliseconds of the floor, of the stages as a CUDA graph, and of every provider with kernels of its own."""
    counts = json.loads(BASELINE.read_text())["counts"]
    found = []
    for tokens, (height, width) in FEATURE_MAPS.items():
        for batch in BATCHES:
            stages = decoder_stages(Shape(batch, height=height, width=width), dtype=dtype)
            predicted = {"floor": floor_seconds(stages, gpu, dtype), "graph": graph_seconds(stages, gpu, dtype)}
            for provider, modes in counts[str(tokens)].items():
                calls = modes.get("inference")
                if calls is None or not calls["kernel_launches"]:
                    continue  # its attention goes through memory: another model's work
                predicted[provider] = eager_seconds(stages, gpu, dtype, calls["aten_calls"], calls["kernel_launches"])
            found.append(
                {
                    "gpu": gpu.name,
                    "dtype": dtype,
                    "batch": batch,
                    "tokens": tokens,
                    "gflop": sum(s.times * s.flops for s in stages) / 1e9,
                    "mbytes": sum(s.times * s.bytes for s in stages) / 1e6,
                    "dependent_stages": sum(s.times for s in stages if s.dependent),
                    "predicted_ms": {name: 1e3 * seconds for name, seconds in predicted.items()},
                }
            )
    return found


def measured(folder: Path, gpu: Gpu, dtype: str) -> dict[tuple[int, int, str], tuple[float, str]]:
    """{(batch, tokens, provider): (p50 ms, commit)}: the newest row of each, unpadded, 300 queries."""
    found = {}
    for path in sorted(folder.glob("*.csv")):
        for row in rows.read(path):
            same = (row["op"], row["mode"], row["dtype"], row["queries"], row["padded"])
            if same != ("decoder", "inference", dtype, "300", "False") or gpu.name not in row["device"]:
                continue
            if row["p50_ms"]:
                where = (int(row["batch"]), int(row["tokens"]), row["provider"])
                found[where] = (float(row["p50_ms"]), row["commit"])
    return found


def totals(gpu: Gpu, dtype: str, folder: Path) -> str:
    known = measured(folder, gpu, dtype)
    lines = [f"Predicted, not measured: the decoder's forward on one {gpu.name}, {dtype}, milliseconds"]
    for case in predict(gpu, dtype):
        lines.append(
            f"B{case['batch']} S{case['tokens']}: {case['gflop']:.1f} GFLOP, {case['mbytes']:.0f} MB, "
            f"{case['dependent_stages']} dependent stages"
        )
        names = sorted({p for b, s, p in known if (b, s) == (case["batch"], case["tokens"])})
        for name, ms in case["predicted_ms"].items():
            lines.append(f"  {name:12} predicted {ms:8.3f}{_measured(known, case, name)}")
        lines += [
            f"  {name:12} predicted        -{_measured(known, case, name)}"
            for name in names
            if name not in case["predicted_ms"]
        ]
    return "\n".join(lines)


def _measured(known: dict, case: dict[str, Any], name: str) -> str:
    found = known.get((case["batch"], case["tokens"], name))
    return "" if found is None else f"   measured {found[0]:8.3f} at {found[1]}"


def stage_table(gpu: Gpu, dtype: str, shape: Shape) -> str:
    lines = [
        f"Predicted, not measured: stages of the decoder's forward on one {gpu.name}, {dtype}, {shape}",
        f"{'stage':32} {'times':>5} {'MFLOP':>9} {'MB':>8} {'tiles':>6} {'us each':>8}",
    ]
    for s in decoder_stages(shape, dtype=dtype):
        us = 1e6 * s.seconds(gpu, dtype)
        lines.append(f"{s.name:32} {s.times:5} {s.flops / 1e6:9.1f} {s.bytes / 1e6:8.2f} {s.tiles:6} {us:8.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=[g.name for g in hardware.GPUS], default=hardware.GPUS[0].name)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--stages", action="store_true", help="every stage of every shape")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args(argv)
    gpu = hardware.gpu(args.gpu)
    assert gpu is not None
    if args.json:
        print(json.dumps(predict(gpu, args.dtype), indent=1))
        return
    print(totals(gpu, args.dtype, args.results))
    if args.stages:
        for height, width in FEATURE_MAPS.values():
            for batch in BATCHES:
                print(f"\n{stage_table(gpu, args.dtype, Shape(batch, height=height, width=width))}")


if __name__ == "__main__":
    main()
