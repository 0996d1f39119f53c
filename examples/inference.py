"""Detect objects in a photo with an accelerated Hugging Face DAB-DETR.

    python examples/inference.py PHOTO --checkpoint DIRECTORY

DIRECTORY is what `save_pretrained` wrote. Without it the model has random weights, and its boxes mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

import dab_fast


def load_model(checkpoint: Path | None) -> DabDetrForObjectDetection:
    if checkpoint is not None:
        return DabDetrForObjectDetection.from_pretrained(checkpoint)
    return DabDetrForObjectDetection(DabDetrConfig(backbone_config=ResNetConfig(out_features=["stage4"])))


def preprocess(image: Image.Image, shorter: int, longer: int) -> Tensor:  # [1, 3, height, width]
    """DETR's resize, and ImageNet's mean and standard deviation."""
    factor = min(shorter / min(image.size), longer / max(image.size))
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels - mean[:, None, None]) / std[:, None, None]).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("SHORTER", "LONGER"))
    args = parser.parse_args()

    model = load_model(args.checkpoint).eval().to(args.device)
    print(dab_fast.accelerate(model))  # the one line

    image = Image.open(args.photo).convert("RGB")
    with torch.inference_mode():
        outputs = model(preprocess(image, *args.size).to(args.device))

    scores, classes = outputs.logits[0].sigmoid().max(-1)
    to_pixels = torch.tensor([image.width, image.height] * 2, device=outputs.pred_boxes.device)
    for i in (scores > args.threshold).nonzero().flatten().tolist():
        cx, cy, w, h = (outputs.pred_boxes[0, i] * to_pixels).tolist()
        name = model.config.id2label[int(classes[i])]
        print(f"{scores[i]:.2f}  {name:16}  x {cx - w / 2:7.1f}  y {cy - h / 2:7.1f}  w {w:7.1f}  h {h:7.1f}")


if __name__ == "__main__":
    main()
