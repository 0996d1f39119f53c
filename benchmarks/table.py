"""The newest rows of a results folder as a table: python -m benchmarks.table [FOLDER] [--only "decoder inference"]"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.predict import RESULTS
from dab_fast.bench import rows

_NUMBERS = {"batch", "queries", "tokens", "aten_calls", "kernel_launches", "host_syncs", "rounds"}


def newest(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row for each thing measured: the last of those with the newest date."""
    kept: dict[tuple, dict[str, str]] = {}
    for row in found:
        what = tuple(row[column] for column in rows.WHAT)
        if what not in kept or row["date"] >= kept[what]["date"]:
            kept[what] = row
    return list(kept.values())


def parsed(row: dict[str, str]) -> rows.Row:
    """The row with the types that it was measured in."""

    def value(column: str, text: str) -> Any:
        if text == "":
            return None
        if text in ("True", "False"):
            return text == "True"
        if column in rows.WHERE or column in ("op", "mode", "provider", "dtype"):
            return text
        return int(text) if column in _NUMBERS else float(text)

    return {column: value(column, text) for column, text in row.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="rows whose op and mode contain this")
    args = parser.parse_args(argv)
    for path in sorted(args.folder.glob("*.csv")):
        found = [r for r in newest(rows.read(path)) if args.only in f"{r['op']} {r['mode']}"]
        if found:
            print(f"{found[-1]['device']}, torch {found[-1]['torch']}, {found[-1]['date']}, {found[-1]['commit']}")
            print(rows.table(parsed(row) for row in found))


if __name__ == "__main__":
    main()
