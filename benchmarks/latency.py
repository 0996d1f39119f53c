"""How long a user waits for the objects on a photo: python -m benchmarks.latency [--calls 100] [--device cuda] [--json]

From the opened photo to the detections, with Hugging Face's image processor and its post-processing, the original and
the accelerated model in turn, each call by the wall clock. The detections are compared: one differs where its label
does, its score by more than 1e-3 (random weights give many that are nearly alike), or its box by more than 0.05 px.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import dab_fast
from dab_fast import measure
from dab_fast.cli import demo

SCORE, PIXELS = 1e-3, 0.05  # how far a detection may be from the original's
KEPT = 100  # detections, those with the highest scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="of each model (default 100)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new round after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small photo, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    found = latencies(args.calls, args.seconds, torch.device(args.device), tiny=args.tiny)
    print(json.dumps(found, indent=1) if args.json else table(found))
    if found["differing"]:
        sys.exit(f"{found['differing']} of {KEPT} detections differ")


def latencies(calls: int, seconds: float, device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """Times in milliseconds: {step: {"p50": …, "p99": …}}, for what both share and for each model."""
    from transformers.models.conditional_detr.image_processing_pil_conditional_detr import (
        ConditionalDetrImageProcessorPil,
    )

    processor: Any = ConditionalDetrImageProcessorPil()
    photo = demo.read_image(demo.default_image())
    if tiny:
        photo = photo.resize((photo.width // 8, photo.height // 8))
        processor.size = {"shortest_edge": photo.height, "longest_edge": photo.width}

    def read() -> Any:
        return processor(images=[photo], return_tensors="pt").to(device)

    original = demo.random_model(demo.resnet50_config(), read()["pixel_values"].cpu()).to(device)
    accelerated = copy.deepcopy(original)
    report = dab_fast.accelerate(accelerated)

    def objects(outputs: Any) -> dict[str, torch.Tensor]:
        sizes = [(photo.height, photo.width)]
        return processor.post_process_object_detection(outputs, 0.0, sizes, top_k=KEPT)[0]

    def detect(model: Any) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: {name: x.cpu() for name, x in objects(model(**read())).items()}

    with torch.no_grad():
        theirs, ours = detect(original)(), detect(accelerated)()
        outputs = original(**read())
        steps = {
            "image processor": read,
            "post-processing": lambda: objects(outputs),
            "photo to objects, original": detect(original),
            "photo to objects, accelerated": detect(accelerated),
        }
        times = measure.interleaved_times(steps, calls, warmup=3, seconds=seconds, device=device)
    assert not any(report.stepped_aside.values()), report
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "size": photo.size,
        "calls": min(len(t.wall) for t in times.values()),
        "differing": differing(theirs, ours),
        "times": {
            name: {f"p{q}": 1e3 * measure.quantile(t.wall, q / 100) for q in (50, 99)} for name, t in times.items()
        },
    }


def differing(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> int:
    """How many of the original's detections the accelerated model does not give."""
    scores = (theirs["scores"][:, None] - ours["scores"]).abs() <= SCORE
    boxes = ((theirs["boxes"][:, None] - ours["boxes"]).abs() <= PIXELS).all(-1)
    labels = theirs["labels"][:, None] == ours["labels"]
    return int((~(scores & boxes & labels).any(1)).sum())


def table(found: dict[str, Any]) -> str:
    width, height = found["size"]
    lines = [f"{width} × {height} on {found['device']}, {found['calls']} calls each, ms{'p50':>13}{'p99':>10}"]
    lines += [f"{name:40}{t['p50']:10.1f}{t['p99']:10.1f}" for name, t in found["times"].items()]
    theirs, ours = (found["times"][f"photo to objects, {x}"] for x in ("original", "accelerated"))
    lines.append(f"{'times as fast':40}{theirs['p50'] / ours['p50']:10.2f}{theirs['p99'] / ours['p99']:10.2f}")
    return "\n".join([*lines, f"{found['differing']} of the {KEPT} best detections differ"])


if __name__ == "__main__":
    main()
