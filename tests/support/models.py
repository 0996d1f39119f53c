"""Small DAB-DETR models for parity tests, with every parameter perturbed.

Freshly initialised weights hide errors: the last box layer and all biases are zero, so no box moves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

# The largest differences of float32 sums in another order, on perturbed weights (design: 2e-5 and 5e-6).
HIDDEN_TOLERANCE = 2e-5
BOX_TOLERANCE = 5e-6


def perturb_(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)


def huggingface_model(*, std: float = 0.1, **config: object) -> DabDetrForObjectDetection:
    """A DAB-DETR with a tiny backbone, in eval mode; at full width `std` 0.03 keeps float32 well-conditioned."""
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
    defaults: dict[str, object] = dict(
        backbone_config=backbone,
        hidden_size=64,
        num_queries=17,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        dropout=0.0,
        num_labels=5,
        auxiliary_loss=True,
    )
    model = DabDetrForObjectDetection(DabDetrConfig(**(defaults | config)))
    perturb_(model, std=std)
    return model.eval()


def images(batch: int = 2, height: int = 96, width: int = 128, *, padded: bool = False) -> dict[str, Tensor]:
    """pixel_values, and with `padded` a pixel_mask under which every image has another size."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}
    if padded:
        mask = torch.zeros(batch, height, width, dtype=torch.long)
        for i in range(batch):
            mask[i, : height - 32 * (i % 2), : width - 32 * ((i + 1) % 2)] = 1
        inputs["pixel_mask"] = mask
    return inputs


def labels(batch: int = 2) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.25, 0.6, 0.1, 0.4]])
    return [{"class_labels": torch.tensor([1, 3]), "boxes": boxes + 0.01 * i} for i in range(batch)]


def accelerated_copy(model: nn.Module, **options: bool) -> nn.Module:
    import dab_fast

    fast = copy.deepcopy(model)
    dab_fast.accelerate(fast, **options)
    return fast


def replicate(module: nn.Module) -> nn.Module:
    """One CPU replica, made as torch.nn.parallel.replicate makes it (which itself wants a GPU)."""
    modules = list(module.modules())
    replicas = {m: m._replicate_for_data_parallel() for m in modules}
    for m, replica in replicas.items():
        for key, child in m._modules.items():
            if child is not None:
                setattr(replica, key, replicas[child])
        for key, parameter in m._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.detach().clone())
        for key, buffer in m._buffers.items():
            if buffer is not None:
                setattr(replica, key, buffer)
    return replicas[module]


def assert_same_outputs(ours: Any, theirs: Any) -> None:
    for key in ("logits", "last_hidden_state"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=HIDDEN_TOLERANCE)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=BOX_TOLERANCE)


def assert_same_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """Per parameter |difference| <= 1e-4 * max(|g|, 1e-3 * the largest gradient norm).

    Key biases have a zero gradient analytically, so a plain relative comparison would compare rounding errors.
    """
    assert ours.keys() == theirs.keys()
    largest = max(g.norm().item() for g in theirs.values() if g is not None)
    assert largest > 0
    for name, theirs_g in theirs.items():
        ours_g = ours[name]
        if theirs_g is None or ours_g is None:
            present = ours_g if theirs_g is None else theirs_g
            assert present is None or present.abs().max() == 0, f"{name}: one gradient is missing"
            continue
        difference = (ours_g - theirs_g).norm().item()
        assert difference <= 1e-4 * max(theirs_g.norm().item(), 1e-3 * largest), f"{name}: {difference}"
