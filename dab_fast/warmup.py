"""Compile ahead what a decoder will launch, so that no step of a training or a service waits for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from dab_fast import ops
from dab_fast.config import DecoderConfig
from dab_fast.decoder import DabDecoder
from dab_fast.reference import box_mlp


def warmup(
    shapes: Iterable[tuple[int, int, int]],  # (B, Q, S): images, queries, memory tokens
    *,
    config: DecoderConfig | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    device: torch.device | str = "cuda",
) -> None:
    """Runs a decoder with parameters of its own once per shape, padded and not, on the Triton kernels.

    Your model and the random state stay as they are. The kernels are those of `box_position_embed`,
    `modulated_cross_attention` and `refine_boxes`, configured by shape and dtype.

    Args:
        shapes: (B, Q, S) of the calls to come: images, queries (patterns included), memory tokens h * w.
        config: of the decoder to come; the default is DAB-DETR R50's.
        dtype: float32, or the dtype of the autocast region in which the decoder will run.
        training: with dropout, and the backward too.
        device: the GPU; compiled kernels are cached on disk, for each architecture.

    Raises:
        BackendUnavailable: there is no GPU, none that the kernels run on, or they do not take the decoder's widths.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ops.BackendUnavailable("warmup compiles for a GPU, and torch.cuda.is_available() is False")
    config = config or DecoderConfig()
    # The first layer differs from the others, which are alike.
    short = dataclasses.replace(config, num_layers=min(2, config.num_layers))
    gpus = [device] if device.type == "cuda" else []
    with ops.backend("triton"), torch.random.fork_rng(gpus), torch.autocast(device.type, dtype, dtype != torch.float32):
        decoder = DabDecoder(short).to(device).train(training)
        params = dict(decoder.named_parameters())
        for b, q, s in shapes:
            for padded in (False, True):
                mask = torch.zeros(b, s, dtype=torch.bool, device=device) if padded else None
                memory = torch.zeros(b, s, config.d_model, device=device, requires_grad=training)
                pos = torch.zeros(b if padded else 1, s, config.d_model, device=device)
                content = torch.zeros(b, q, config.d_model, device=device)
                anchors = torch.zeros(b, q, config.query_dim, device=device, requires_grad=training)
                with torch.set_grad_enabled(training):
                    hidden, references = decoder(content, memory, pos, anchors, memory_key_padding_mask=mask)
                    total = hidden.sum() + references.sum()
                    if config.bbox_embed == "shared":  # the prediction head reads the stack of all layers
                        stack = hidden[:1].expand(config.num_layers, -1, -1, -1)
                        boxes = references[:1].expand(config.num_layers, -1, -1, -1)
                        mlp = box_mlp(params, 0)
                        total += ops.refine_boxes(stack, boxes, *mlp, eps=config.inverse_sigmoid_eps).sum()
                if training:
                    total.backward()
