"""Rows of measurements: what they hold, when a speed-up may be shown, and the file that keeps them."""

from __future__ import annotations

import csv
import datetime
import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

WHAT = ("op", "mode", "provider", "batch", "queries", "tokens", "padded", "dtype")
WHERE = ("device", "driver", "threads", "python", "torch", "triton", "transformers", "commit", "date")
KEY = (*WHAT, *WHERE)
COLUMNS = (
    *WHAT,
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "wall_p50_ms",
    "rounds",
    "peak_mb",
    "saved_mb",
    "aten_calls",
    "kernel_launches",
    "host_syncs",
    "error",  # against float64: largest of the output (boxes; ops: over the largest value); median over gradients
    "peer_error",  # the same of the baseline
    "worst_error",  # where there are gradients, of the worst one: hangs on single units of relu
    "accurate",  # the gate: at most twice the baseline's error, plus the floor of the dtype
    "speedup",  # over the baseline in the same run; only where accurate
    "floor_ms",  # predicted: see benchmarks.predict
    "floor_pct",  # floor_ms / p50_ms
    *WHERE,
)

# A row whose 80th percentile is this many times its 20th was measured on a busy machine.
BUSY = 1.5


@functools.cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def commit() -> str:
    """The checkout's commit, "-dirty" where tracked code differs; without git a digest of the package's sources."""
    root = Path(__file__).parents[2]
    head = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD") if (root / ".git").exists() else ""
    if not head:
        digest = hashlib.sha256()
        for path in sorted(Path(__file__).parents[1].rglob("*.py")):
            digest.update(path.read_bytes())
        return f"sources-{digest.hexdigest()[:10]}"
    changed = _output("git", "-C", str(root), "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return head + "-dirty" * bool(changed)


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    except OSError:
        pass
    return f"{re.sub(r'[(](R|TM)[)]', '', model).strip()}, {os.cpu_count()} cores"


def where(device: torch.device) -> Row:
    """What a measurement depends on besides what is measured."""
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type != "cpu" else ""
    )
    return {
        "device": device_name(device),
        "driver": driver.partition("\n")[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "transformers": _installed("transformers"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def results_file(folder: Path, device: torch.device) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.csv"


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_text(row.get(column)) for column in KEY)


def _text(x: Any) -> str:
    if x is None:
        return ""
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def append(path: Path, rows: Iterable[Row], *, replace: bool = False) -> list[Row]:
    """Adds rows to a CSV file and returns those left out, because their key (what, where, commit, date) is there.

    Args:
        replace: the new row takes the place of the old one instead.
    """
    kept = {key(row): row for row in read(path)}
    refused = []
    for row in rows:
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"rows must have the columns of COLUMNS, got also {sorted(unknown)}")
        if key(row) in kept and not replace:
            refused.append(row)
        else:
            kept[key(row)] = {column: _text(row.get(column)) for column in COLUMNS}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    new.replace(path)
    return refused


def busy(row: Row) -> bool:
    """Whether the times of a row differ too much to say much: something else ran on the machine."""
    return bool(row.get("p20_ms")) and row["p80_ms"] > BUSY * row["p20_ms"]


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one block per case, the baseline first; "~" after a speed-up marks times of a busy machine."""
    blocks: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        blocks.setdefault(tuple(row[c] for c in WHAT if c != "provider"), []).append(row)
    lines = []
    for (op, mode, batch, queries, tokens, padded, dtype), block in blocks.items():
        size = f"B{batch} Q{queries}{f' S{tokens}' if tokens else ''}{' padded' * bool(padded)}"
        lines.append(f"{op} {mode}, {size}, {dtype}")
        head = ("p50 ms", "p20", "p80", "speed-up", "error", "peak MB", "saved MB", "ATen", "kernels", "syncs", "floor")
        lines.append(f"  {'provider':12}" + "".join(f"{h:>10}" for h in head))
        for row in block:
            if row.get("speedup") is not None:
                speedup = f"{row['speedup']:.2f}x{'~' * (busy(row) or busy(block[0]))}"
            elif row["accurate"] or row["accurate"] is None:
                speedup = "-"
            else:
                speedup = "inexact" if row.get("error") is not None else "unchecked"
            cells = (
                *(_short(row.get(c)) for c in ("p50_ms", "p20_ms", "p80_ms")),
                speedup,
                "-" if row.get("error") is None else f"{row['error']:.1e}",
                *(_short(row.get(c)) for c in ("peak_mb", "saved_mb", "aten_calls", "kernel_launches", "host_syncs")),
                "-" if row.get("floor_pct") is None else f"{row['floor_pct']:.0f}%",
            )
            lines.append(f"  {row['provider']:12}" + "".join(f"{c:>10}" for c in cells))
    return "\n".join(lines)


def _short(x: Any) -> str:
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)
