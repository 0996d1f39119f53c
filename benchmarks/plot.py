"""Pictures of the results: python -m benchmarks.plot [--results FOLDER] [--out FOLDER]

Per device: decoder times (over the batch where several were measured), speed-ups, memory. For any machine: the counts
and the predicted roofline, with measured points where there are some. PNG, with a transparent background and colours
that can be read on white and on black.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.counts import BASELINE
from benchmarks.predict import RESULTS, measured, predict
from benchmarks.table import newest
from dab_fast.bench import hardware, rows

INK = "#7d8590"  # a gray in the middle: text and axes on either background
COLORS = {
    "huggingface": "#8b949e",
    "eager": "#8b949e",
    "sdpa": "#bf8700",
    "compile": "#8957e5",
    "compile_max": "#db61a2",
    "flex": "#1b9e9e",
    "torch": "#388bfd",
    "triton": "#e5534b",
    "triton_recompute": "#f0a39b",
    "native": "#2da44e",
    "auto": "#1f8fb3",
    "floor": INK,
    "graph": "#388bfd",
}
OTHER = "#c98a5a"  # a provider that has no colour yet
STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}

Row = dict[str, str]


def _title(row: Row) -> str:
    queries = "" if row["queries"] == "300" else f" Q{row['queries']}"
    padded = " padded" * (row["padded"] == "True")
    return f"{row['mode']}  B{row['batch']}{queries} S{row['tokens']}{padded} {row['dtype']}"


def _source(found: list[Row]) -> str:
    commits = sorted({row["commit"] for row in found})
    dates = sorted({row["date"] for row in found})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = sorted({f"torch {row['torch']}" for row in found})
    return f"{found[0]['device']}, {', '.join(versions)}, {span}, commit {', '.join(commits)}"


def _bars(axes: Axes, found: list[Row], column: str, label: str, form: str) -> None:
    """One group of horizontal bars per case, one bar per provider, its value at its end."""
    cases: dict[str, list[Row]] = {}
    for row in found:
        if row[column]:
            cases.setdefault(_title(row), []).append(row)
    at, ticks, names = 0.0, [], []
    for name, group in cases.items():
        first = at
        for row in group:
            value = float(row[column])
            axes.barh(at, value, height=0.82, color=COLORS.get(row["provider"], OTHER))
            axes.annotate(
                f"{row['provider']}  {value:{form}}", (value, at), (4, 0), textcoords="offset points", va="center"
            )
            at += 1
        ticks.append((first + at - 1) / 2)
        names.append(name)
        at += 0.8
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.28, y=0.02)
    axes.tick_params(axis="y", length=0)


def _bar_figure(found: list[Row], column: str, label: str, title: str, form: str = ".3g") -> Any:
    found = [row for row in found if row[column]]
    if not found:
        return None
    groups = len({_title(row) for row in found})
    figure, axes = plt.subplots(figsize=(8.5, 1.6 + 0.3 * len(found) + 0.2 * groups), layout="constrained")
    _bars(axes, found, column, label, form)
    axes.set_title(title, loc="left")
    figure.supxlabel(_source(found), fontsize=8, color=INK)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names at the right ends of lines on a logarithmic axis, moved apart where they would meet."""
    low, high = axes.get_ylim()
    apart, above = (high / low) ** 0.045, 0.0
    for name, color, x, y in sorted(ends, key=lambda end: end[3]):
        above = max(y, above * apart)
        axes.annotate(
            name, (x, above), (8, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
        )


def times(found: list[Row]) -> Any:
    """The decoder's forward: lines over the batch where there are several, else bars."""
    chosen = [r for r in found if r["op"] == "decoder" and r["mode"] == "inference" and r["p50_ms"]]
    plain = [r for r in chosen if r["queries"] == "300" and r["padded"] == "False"]
    dtype = "bf16" if any(hardware.gpu(r["device"]) for r in plain) else "fp32"
    lines = [r for r in plain if r["dtype"] == dtype]
    tokens = sorted({int(r["tokens"]) for r in lines})
    if len({r["batch"] for r in lines}) < 3:
        return _bar_figure(chosen, "p50_ms", "milliseconds (median)", "Decoder, forward: measured")
    figure, panels = plt.subplots(1, len(tokens), figsize=(9, 4.2), sharey=True, squeeze=False, layout="constrained")
    for axes, s in zip(panels[0], tokens, strict=True):
        here, ends = [r for r in lines if int(r["tokens"]) == s], []
        for provider in dict.fromkeys(r["provider"] for r in here):
            points = sorted((int(r["batch"]), float(r["p50_ms"])) for r in here if r["provider"] == provider)
            color = COLORS.get(provider, OTHER)
            axes.plot(*zip(*points, strict=True), marker="o", color=color)
            ends.append((provider, color, *points[-1]))
        floors = sorted({(int(r["batch"]), float(r["floor_ms"])) for r in here if r["floor_ms"]})
        if floors:
            axes.plot(*zip(*floors, strict=True), "--", color=INK)
            ends.append(("floor (predicted)", INK, *floors[-1]))
        batches = sorted({int(r["batch"]) for r in here})
        axes.set(xscale="log", yscale="log", xlabel="batch", title=f"S = {s}")
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.margins(x=0.4)
        _label_ends(axes, ends)
    panels[0][0].set_ylabel(f"milliseconds (median), {dtype}")
    figure.suptitle("Decoder, forward: measured", color=INK)
    figure.supxlabel(_source(lines), fontsize=8, color=INK)
    return figure


def speedups(found: list[Row]) -> Any:
    """Only accurate rows have a speed-up; the baseline is 1."""
    chosen = [r for r in found if r["op"] in ("decoder", "model") and r["speedup"] and r["provider"] != "huggingface"]
    figures = [{**r, "mode": f"{r['op']} {r['mode']}"} for r in chosen]
    figure = _bar_figure(
        figures, "speedup", "times as fast as Hugging Face, in the same run", "Speed-up: measured", ".2f"
    )
    if figure is not None:
        figure.axes[0].axvline(1, color=INK, linewidth=1)
    return figure


def memory(found: list[Row]) -> Any:
    chosen = [r for r in found if r["op"] == "decoder" and r["mode"] == "training"]
    return _bar_figure(chosen, "saved_mb", "MB kept for backward", "Decoder, training: kept for backward", ".0f")


def counts() -> Any:
    committed = json.loads(BASELINE.read_text())
    panels = (("inference", "calls, forward"), ("training", "calls, forward + backward"))
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), layout="constrained")
    providers = list(committed["counts"]["1050"])
    for panel, (mode, label) in zip(axes, panels, strict=False):
        for i, provider in enumerate(providers):
            numbers = committed["counts"]["1050"][provider].get(mode)
            if numbers is None:
                continue
            aten, own = numbers["aten_calls"], numbers["kernel_launches"]
            color = COLORS.get(provider, OTHER)
            panel.barh(i, aten, color=color)
            panel.barh(i, own, left=aten, color=color, alpha=0.55, hatch="///", edgecolor=INK, linewidth=0)
            text = f"{aten} ATen + {own} own" if own else f"{aten} ATen"
            panel.annotate(text, (aten + own, i), (4, 0), textcoords="offset points", va="center")
        panel.set_xlabel(label)
    for i, provider in enumerate(providers):
        numbers = committed["counts"]["4200"][provider].get("training")
        if numbers is not None:
            megabytes = numbers["saved_bytes"] / 1e6
            axes[2].barh(i, megabytes, color=COLORS.get(provider, OTHER))
            axes[2].annotate(f"{megabytes:.0f} MB", (megabytes, i), (4, 0), textcoords="offset points", va="center")
    axes[2].set_xlabel("kept for backward, S = 4200, fp32")
    for panel in axes:
        panel.set_yticks(range(len(providers)), providers if panel is axes[0] else [""] * len(providers))
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.45)
        panel.set_ylim(len(providers) - 0.5, -0.5)
    used = ", ".join(f"{name} {number}" for name, number in committed["versions"].items())
    figure.suptitle("The decoder at B = 1: counted, exact on any machine", color=INK)
    figure.supxlabel(used, fontsize=8, color=INK)
    return figure


def roofline(folder: Path, gpu: hardware.Gpu) -> Any:
    predicted, known = predict(gpu), measured(folder, gpu, "bf16")
    tokens = sorted({case["tokens"] for case in predicted})
    figure, panels = plt.subplots(1, len(tokens), figsize=(9, 4), sharey=True, squeeze=False, layout="constrained")
    for axes, s in zip(panels[0], tokens, strict=True):
        here, ends = [case for case in predicted if case["tokens"] == s], []
        batches = [case["batch"] for case in here]
        for name in here[0]["predicted_ms"]:
            color = COLORS.get(name, OTHER)
            values = [case["predicted_ms"][name] for case in here]
            axes.plot(batches, values, "--", color=color)
            ends.append((name, color, batches[-1], values[-1]))
        for provider in sorted({p for _, t, p in known if t == s}):
            points = sorted((b, ms) for (b, t, p), (ms, _) in known.items() if (t, p) == (s, provider))
            axes.plot(*zip(*points, strict=True), "o", color=COLORS.get(provider, OTHER), label=f"{provider}, measured")
        axes.set(xscale="log", yscale="log", xlabel="batch", title=f"S = {s}")
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.margins(x=0.25)
        _label_ends(axes, ends)
    if known:
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, labelcolor=INK)
    panels[0][0].set_ylabel("milliseconds, bf16")
    dots = "; dots: measured" if known else ""
    figure.suptitle(f"Decoder, forward, on one {gpu.name}: predicted (dashed){dots}", color=INK)
    return figure


def draw(results: Path, out: Path) -> list[Path]:
    """Writes every picture that the results allow and returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        if figure is None:
            return
        figure.savefig(out / f"{name}.png")
        plt.close(figure)
        written.append(out / f"{name}.png")

    with plt.rc_context(STYLE):
        devices = []
        for path in sorted(results.glob("*.csv")):
            found = newest(rows.read(path))
            devices += [row["device"] for row in found[:1]]
            for name, figure in (("times", times), ("speedups", speedups), ("memory", memory)):
                save(figure(found), f"{path.stem}-{name}")
        save(counts(), "counts")
        known = next((gpu for device in devices if (gpu := hardware.gpu(device))), hardware.GPUS[0])
        save(roofline(results, known), "roofline")
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: that of the results")
    args = parser.parse_args(argv)
    for path in draw(args.results, args.out or args.results):
        print(path)


if __name__ == "__main__":
    main()
