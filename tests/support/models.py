"""Small DAB-DETR models for parity tests, with every parameter perturbed.

Freshly initialised weights hide errors: the last box layer and all biases are zero, so no box moves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

from dab_fast.accuracy import BOX_TOLERANCE, GRADIENT_TOLERANCE, HIDDEN_TOLERANCE, gradient_errors


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


def accelerated_copy(model: nn.Module, **options: Any) -> nn.Module:
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


def wide(module: nn.Module) -> nn.Module:
    """A copy in float64, where no unit of a relu is so near zero that sums in another order turn it over.

    In float32, with some ten thousand units, one test in a hundred has such a unit, and a gradient that differs by more
    than `GRADIENT_TOLERANCE`. Hugging Face's softmax is in float32 all the same.
    """
    return copy.deepcopy(module).double()


def assert_same_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """Every gradient in float32 but for sums in another order; one that is missing on one side is zero on the other."""
    assert ours.keys() == theirs.keys()
    assert any(g is not None and g.any() for g in theirs.values())
    for name, g in ours.items():
        if theirs[name] is None:
            assert g is None or not g.any(), f"{name}: one gradient is missing"
    for name, error in gradient_errors(ours, theirs).items():
        assert ours[name] is not None or not error, f"{name}: one gradient is missing"
        assert error <= GRADIENT_TOLERANCE, f"{name}: {error:.2e} of its norm"
