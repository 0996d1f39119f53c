"""The demo's picture: the boxes of both models over each other, and the corner where they differ most, magnified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import patches, patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from dab_fast.cli.demo import Comparison, Detections

MOST_BOXES = 8
FAR = 40.0  # pixels from the corner to the frame in the first magnification
OVERLAP = 0.35  # boxes that overlap a better one by more than this (intersection over union) are left out
LEAST_SCORE = 0.3  # of a trained model's box
ORIGINAL, ACCELERATED = "#00c2ff", "#ffffff"
INK, MUTED, PAPER = "#16202a", "#5d6b78", "#ffffff"


def draw(
    path: Path,
    image: Image.Image,
    comparison: Comparison,
    original: Detections,
    accelerated: Detections,
    labels: dict[int, str] | None,  # class names of a trained model; None: random weights, whose classes say nothing
) -> None:
    """Writes the picture to `path`, whose ending says its format."""
    pixels = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
    theirs, ours = (_corners(x.boxes) * pixels for x in (original, accelerated))
    shown = _best(original, theirs, trained=labels is not None)
    worst = _worst(theirs[shown], ours[shown], pixels)

    width = 13.0
    panel = 0.62 * width  # of the photo, in inches
    height = panel * image.height / image.width + 1.65
    figure = Figure(figsize=(width, height), dpi=120, facecolor=PAPER)
    top, bottom = 1 - 1.15 / height, 0.5 / height
    photo = figure.add_axes((0.025, bottom, panel / width, top - bottom))
    photo.imshow(image, extent=(0, image.width, image.height, 0), interpolation="lanczos")
    photo.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    for spine in photo.spines.values():
        spine.set_visible(False)
    for rank, i in enumerate(shown.tolist()):
        _outline(photo, theirs[i], ours[i])
        if labels is not None:
            _label(photo, theirs[i], original.logits[i], labels)
        if rank == worst:
            _marker(photo, theirs[i])

    figure.text(0.025, 1 - 0.38 / height, _headline(comparison), fontsize=17, weight="bold", color=INK, va="center")
    figure.text(0.025, 1 - 0.70 / height, _subtitle(comparison), fontsize=10.5, color=MUTED, va="center")
    _legend(figure, photo, bottom)

    left, gap = 0.025 + panel / width + 0.03, 0.085
    half = (top - bottom - gap) / 2
    offset = (theirs[shown[worst]] - ours[shown[worst]])[:2].abs().max().item()
    allowed = comparison.allowed_box_difference_px
    near = max(2 * allowed, 1.5 * offset)
    titles = (
        f"the circled corner, {2 * FAR:.0f} px high",
        f"{2 * near:.3g} px high: offset {offset:.2g} px, allowed {allowed:.2g} px (yellow)",
    )
    for k, (reach, title) in enumerate(zip((FAR, near), titles, strict=True)):
        axes = figure.add_axes((left, bottom + (1 - k) * (half + gap), 0.975 - left, half))
        _zoom(axes, image, theirs[shown[worst]], ours[shown[worst]], reach, allowed)
        axes.set_title(title, fontsize=9.5, color=MUTED, loc="left", pad=5)
    figure.savefig(path, facecolor=PAPER)


def _corners(boxes: Tensor) -> Tensor:  # [Q, 4] cx, cy, w, h -> x0, y0, x1, y1
    center, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat((center - size / 2, center + size / 2), -1)


def _best(
    answer: Detections,
    corners: Tensor,  # [Q, 4] x0, y0, x1, y1
    *,
    trained: bool,
) -> Tensor:  # indices of the boxes to show
    """The boxes of highest score that do not overlap; of a trained model those it is sure of, if there are any."""
    scores = answer.logits.sigmoid().amax(-1)
    sure = bool((scores > LEAST_SCORE).any())
    chosen: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if trained and sure and scores[i] <= LEAST_SCORE:
            break
        if all(_overlap(corners[i], corners[j]) < OVERLAP for j in chosen):
            chosen.append(i)
        if len(chosen) == MOST_BOXES:
            break
    return torch.tensor(chosen, dtype=torch.long)


def _worst(
    theirs: Tensor,  # [N, 4] x0, y0, x1, y1 in pixels
    ours: Tensor,  # [N, 4]
    pixels: Tensor,  # [4] width, height, width, height
) -> int:
    """The box whose upper left corner differs most, of those whose corner is on the photo, if any is."""
    difference = (theirs - ours)[:, :2].abs().amax(-1)
    inside = ((theirs[:, :2] > 0) & (theirs[:, :2] < pixels[:2])).all(-1)
    return int((difference + inside * pixels.max()).argmax())


def _overlap(a: Tensor, b: Tensor) -> float:  # [4], [4]
    """Intersection over union."""
    inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return (inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)).item()


def _outline(axes: Any, theirs: Tensor, ours: Tensor) -> None:  # [4], [4] x0, y0, x1, y1
    dark = [patheffects.Stroke(linewidth=5.0, foreground="#00000080"), patheffects.Normal()]
    styles: tuple[tuple[Tensor, dict[str, Any]], ...] = (
        (theirs, dict(edgecolor=ORIGINAL, linewidth=3.6, path_effects=dark)),
        (ours, dict(edgecolor=ACCELERATED, linewidth=1.4, linestyle=(0, (4, 3)))),
    )
    for box, style in styles:
        x0, y0, x1, y1 = box.tolist()
        axes.add_patch(patches.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))


def _label(axes: Any, box: Tensor, logits: Tensor, labels: dict[int, str]) -> None:  # [4], [classes]
    score, index = logits.sigmoid().max(-1)
    name = labels.get(int(index), str(int(index)))
    x, y = max(float(box[0]), 0.0), max(float(box[1]), 18.0)
    style = dict(boxstyle="square,pad=0.25", facecolor=INK, edgecolor="none", alpha=0.85)
    axes.text(x + 2, y - 3, f"{name} {score:.2f}", color="white", fontsize=9, va="bottom", bbox=style, clip_on=True)


def _marker(axes: Any, box: Tensor) -> None:  # [4] x0, y0, x1, y1
    axes.plot(
        *box[:2].tolist(), marker="o", markersize=15, markerfacecolor="none", color="#ffd166", markeredgewidth=2.4
    )


def _zoom(
    axes: Any,
    image: Image.Image,
    theirs: Tensor,  # [4] x0, y0, x1, y1 in pixels
    ours: Tensor,  # [4]
    reach: float,  # from the corner to the frame, in pixels
    allowed: float,  # difference in pixels, shown as a square around the corner
) -> None:
    """The upper left corner of one box in a window of 2 * reach pixels."""
    x, y = theirs[:2].tolist()
    box = axes.get_window_extent()
    aspect = box.width / box.height
    axes.imshow(image, extent=(0, image.width, image.height, 0), interpolation="nearest", alpha=0.55)
    axes.set_facecolor("#e9edf1")
    square: dict[str, Any] = dict(facecolor="#ffd166", alpha=0.35, edgecolor="#c99700", linewidth=1.2)
    axes.add_patch(patches.Rectangle((x - allowed, y - allowed), 2 * allowed, 2 * allowed, **square))
    for corner, color, width, style in ((theirs, ORIGINAL, 5.0, "-"), (ours, INK, 1.6, (0, (5, 3)))):
        x0, y0, x1, y1 = corner.tolist()
        axes.plot([x1, x0, x0], [y0, y0, y1], color=color, linewidth=width, linestyle=style, solid_joinstyle="miter")
    axes.set(xlim=(x - reach * aspect, x + reach * aspect), ylim=(y + reach, y - reach), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#c8d0d8")


def _legend(figure: Figure, photo: Any, bottom: float) -> None:
    handles = [
        Line2D([], [], color=ORIGINAL, linewidth=3.6, label="original"),
        Line2D([], [], color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)), label="accelerated, dashed over it"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.02, bottom),
        ncols=2,
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
    )


def _headline(comparison: Comparison) -> str:
    difference = comparison.max_box_difference_px
    return f"DAB-DETR, original and accelerated: {comparison.verdict}, largest difference {difference:.2g} px"


def _subtitle(comparison: Comparison) -> str:
    c = comparison
    calls = c.parts["whole model"].aten_calls
    return "   ·   ".join(
        (
            f"{c.image} at {c.size[0]} × {c.size[1]}, {c.device}, {c.dtype}",
            c.weights,
            f"ATen calls {calls.original:.0f} → {calls.accelerated:.0f}",
        )
    )
