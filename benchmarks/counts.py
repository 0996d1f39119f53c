"""What the decoder and the model ask of the machine: python -m benchmarks.counts [--json] [--tokens 1050 4200]

Counted in fp32 on any machine, no GPU needed; the decoder at B = 1, the model on two small images, with its loss:

  aten_calls       ATen calls that compute (views and allocations left out); each is at least one launch on a GPU
  kernel_launches  launches of this package's own kernels
  host_syncs       where the host would wait for the GPU
  saved_bytes      kept for backward: unique storages, parameters left out
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import torch

from dab_fast.bench.counting import METRICS, decoder_counts, model_counts, not_counted
from dab_fast.bench.workloads import FEATURE_MAPS

BASELINE = Path(__file__).with_name("counts.json")


def versions() -> dict[str, str]:
    """What the counts depend on."""
    found = {"python": platform.python_version().rpartition(".")[0], "torch": torch.__version__.partition("+")[0]}
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def table(counts: dict[str, dict]) -> str:
    lines = [f"{'of':>5}  {'provider':17} {'mode':9}  " + "  ".join(f"{m:>15}" for m in METRICS)]
    for subject, providers in counts.items():  # a number of tokens, or "model"
        for provider, modes in providers.items():
            for mode, numbers in modes.items():
                cells = "  ".join(f"{numbers[m]:15,}" for m in METRICS)
                lines.append(f"{subject:>5}  {provider:17} {mode:9}  {cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tokens", type=int, nargs="+", choices=FEATURE_MAPS, default=tuple(FEATURE_MAPS))
    parser.add_argument("--write-baseline", action="store_true", help=f"replace {BASELINE.name}")
    args = parser.parse_args(argv)
    counts = {**decoder_counts(tuple(args.tokens)), "model": model_counts()}
    if args.write_baseline:
        BASELINE.write_text(json.dumps({"versions": versions(), "counts": counts}, indent=1) + "\n")
    print(json.dumps(counts, indent=1) if args.json else table(counts))
    for name, reason in not_counted(torch.device("cpu")).items():
        print(f"{name} is not counted: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
