"""Train an accelerated Hugging Face DAB-DETR, on one device or on several.

    python examples/training.py
    torchrun --nproc-per-node 2 examples/training.py

The data are random, so that the script needs none: put your own dataset where `batches` is. Everything but one line is
what it would be without dab_fast.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

import dab_fast


def build_model(tiny: bool) -> DabDetrForObjectDetection:
    if not tiny:
        backbone = ResNetConfig(out_features=["stage4"])
        return DabDetrForObjectDetection(DabDetrConfig(backbone_config=backbone, auxiliary_loss=True))
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage4"])
    return DabDetrForObjectDetection(
        DabDetrConfig(
            backbone_config=backbone,
            hidden_size=64,
            num_queries=20,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            auxiliary_loss=True,
        )
    )


def batches(steps: int, batch: int, height: int, width: int, seed: int) -> Iterator[dict]:
    """Images of two sizes in one batch, with their masks and boxes (cx, cy, w, h in units of the image)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        mask = torch.ones(batch, height, width, dtype=torch.long)
        mask[1::2, :, width * 3 // 4 :] = 0
        yield {
            "pixel_values": torch.randn(batch, 3, height, width, generator=generator) * mask[:, None],
            "pixel_mask": mask,
            "labels": [
                {
                    "class_labels": torch.randint(0, 2, (3,), generator=generator),
                    "boxes": 0.25 + 0.5 * torch.rand(3, 4, generator=generator),
                }
                for _ in range(batch)
            ],
        }


def to_device(batch: dict, device: torch.device) -> dict:
    labels = [{name: x.to(device) for name, x in label.items()} for label in batch["labels"]]
    return {name: x.to(device) for name, x in batch.items() if isinstance(x, Tensor)} | {"labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1056), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--autocast", choices=("bfloat16", "float16", "off"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script in seconds")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distributed = "RANK" in os.environ
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    rank = dist.get_rank() if distributed else 0

    torch.manual_seed(0)
    model = build_model(args.tiny).to(device).train()
    report = dab_fast.accelerate(model)  # the one line; before DistributedDataParallel wraps the model
    trained: nn.Module = DistributedDataParallel(model) if distributed else model

    in_backbone = [p for name, p in model.named_parameters() if "backbone" in name and p.requires_grad]
    elsewhere = [p for name, p in model.named_parameters() if "backbone" not in name and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": elsewhere}, {"params": in_backbone, "lr": 1e-5}], lr=1e-4)
    dtype = torch.float16 if args.autocast == "float16" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=args.autocast == "float16")

    for step, batch in enumerate(batches(args.steps, args.batch, *args.size, seed=rank)):
        with torch.autocast(device.type, dtype, enabled=args.autocast != "off"):
            loss = trained(**to_device(batch, device)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.4f}")

    if rank == 0:
        print(report)  # with the calls that took the original forward, if there were any
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
