"""Measure this package and its peers: counts, times and errors of the same work in the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def bench(
    full: bool = False,
    only: str = "",
    device: str = "",
    csv: Path | None = None,
    seconds: float = 10.0,
    echo: Callable[[str], None] = print,
) -> int:
    """Times the decoder, the model and the ops here, beside their peers, and shows the table.

    Args:
        full: every shape and dtype instead of a set that ends within five minutes.
        only: cases whose name contains this, such as "decoder inference".
        device: "cpu" or "cuda"; empty: a GPU where there is one.
        csv: a file to add the rows to.
        seconds: of timed rounds per case.

    Returns:
        0, or 1 where one of this package's own providers failed or no case has that name.
    """
    import torch

    from dab_fast.bench import rows
    from dab_fast.bench.cases import cases, measure_case
    from dab_fast.bench.providers import PROVIDERS

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = [case for case in cases(where, "full" if full else "default") if only in str(case)]
    if not chosen:
        echo(f"no case is named like {only!r}")
        return 1
    echo(f"{len(chosen)} cases on {rows.device_name(where)}")
    skipped: dict[str, str] = {}
    broken = False
    for i, case in enumerate(chosen):
        echo(f"[{i + 1}/{len(chosen)}] {case}")
        result = measure_case(case, where, seconds=seconds)
        echo(rows.table(result.rows))
        skipped |= result.skipped
        for name, error in result.failed.items():
            echo(f"  {name} failed: {type(error).__name__}: {error}")
            broken |= PROVIDERS[name].ours
        if csv is not None and (refused := rows.append(csv, result.rows)):
            echo(f"  {len(refused)} rows were in {csv} already and were left as they are")
    for name, reason in skipped.items():
        echo(f"{name} did not take part: {reason}")
    return int(broken)
