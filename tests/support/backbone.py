"""Hugging Face's backbone, small, beside an accelerated copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig

import dab_fast
from tests.support.models import huggingface_model, images

# Of the largest feature: rounding of float32 through twenty convolutions stays below 1e-6 in every draw seen; one norm
# whose scale is left out changes features by more than a tenth.
TOLERANCE = 1e-5

BOTTLENECK = dict(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[2, 1, 2, 1], layer_type="bottleneck")
BASIC = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[2, 1, 1, 2], layer_type="basic")


def encoder(*, out: tuple[str, ...] = ("stage4",), dc5: bool = False, **config: Any) -> Any:
    """Hugging Face's backbone in eval mode, with buffers that hide nothing."""
    model = huggingface_model(backbone_config=ResNetConfig(**(config or BOTTLENECK), out_features=list(out)), std=0.03)
    module: Any = model.model.backbone.conv_encoder
    randomize_buffers(module)
    if dc5:  # transformers' own ResNet has no setting for it: what IDEA's dilated last stage does to its convolutions
        for conv in (x for x in module.model.encoder.stages[3].modules() if isinstance(x, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
    return module


def randomize_buffers(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, x in module.named_buffers():
        noise = torch.rand(x.shape, generator=generator) - 0.5
        x.copy_(noise + (1.0 if name.endswith(("running_var", "weight")) else 0.0))


def pair(**config: Any) -> tuple[Any, Any]:
    """The original, and an accelerated copy."""
    theirs = encoder(**config)
    ours = copy.deepcopy(theirs)
    report = dab_fast.accelerate(ours)
    assert list(report.replaced) == [""], report
    return ours, theirs


def pixels(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 64, 96] and their mask, padded where there are two."""
    given = images(batch, 64, 96, padded=batch > 1)
    return given["pixel_values"], given.get("pixel_mask", torch.ones(batch, 64, 96))


def assert_same(ours: Any, theirs: Any, *given: Tensor) -> None:
    """The fast forward gives what the original gives: values, masks and memory layout."""
    before = sum(ours.dab_fast_reasons.values())
    got, expected = ours(*given), theirs(*given)
    assert sum(ours.dab_fast_reasons.values()) == before, ours.dab_fast_reasons
    assert len(got) == len(expected)
    for (x, mask), (right, right_mask) in zip(got, expected, strict=True):
        assert_close(x, right)
        assert x.stride() == right.stride()
        assert torch.equal(mask, right_mask)


def assert_close(x: Tensor, right: Tensor) -> None:
    assert x.dtype == right.dtype
    torch.testing.assert_close(x, right, rtol=0, atol=TOLERANCE * right.abs().max().item())
