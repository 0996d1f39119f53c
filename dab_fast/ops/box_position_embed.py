"""Sine embedding of anchor boxes, times the content-dependent scale, times the width/height modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast._first_derivative import first_derivative_only
from dab_fast._tracing import constant
from dab_fast.ops import _backends
from dab_fast.ops._checks import check_tensor
from dab_fast.ops._library import define
from dab_fast.precision import at_least_float32


def sine_embed(
    coordinates: Tensor,  # [..., n] in (0, 1)
    num_feats: int = 128,
    temperature: float = 10000.0,
    order: str = "yxwh",
) -> Tensor:  # [..., n * num_feats]
    """sin (i even) and cos (i odd) of 2*pi*c / temperature^(2*floor(i/2) / num_feats), for coordinate c and feature i.

    Args:
        coordinates: Tensor[..., n] in (0, 1), normalized by the image's sides; n >= 2 for order "yxwh".
        num_feats: features per coordinate, even; DAB-DETR has d_model / 2.
        temperature: positive; 10000 for anchors, 20 for the memory's positions in DAB-DETR.
        order: "yxwh" puts the features of the second coordinate first, "xywh" keeps the coordinates' order.

    Returns:
        Tensor[..., n * num_feats] in [-1, 1], in the dtype of `coordinates`.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
        BackendUnavailable: the backend chosen by name cannot run this.

    Follows `gen_sineembed_for_position` of IDEA-Research/DAB-DETR (models/DAB_DETR/transformer.py). dab_fast's kernels
    compute in float32 at least, and give the same bits from run to run.
    """
    _check_embedding("coordinates", coordinates, num_feats, order)
    temperature = constant(temperature)
    backend = _backends.select("box_position_embed", coordinates, coordinates.dtype, num_feats, (coordinates,))
    if backend == "torch":
        return reference.sine_embed(coordinates, num_feats, temperature, order)
    args = (coordinates, None, None, num_feats, temperature, order, coordinates.dtype, False, backend)
    if torch.is_grad_enabled() and coordinates.requires_grad:
        return _BoxPositionEmbed.apply(*args)[0]
    return _forward(*args)[0]


def box_position_embed(
    boxes: Tensor,  # [..., 2 or 4]: cx, cy(, w, h) in (0, 1)
    scale: Tensor | None = None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None = None,  # [..., 2]: w, h; needs 4-d boxes
    *,
    num_feats: int = 128,
    temperature: float = 10000.0,
    order: str = "yxwh",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [..., n * num_feats], [..., 2 * num_feats]
    """The sine embedding g of `boxes`, and g's center half times `scale` times sigmoid(ref_size_logits) / (w, h).

    Args:
        boxes: Tensor[..., 2 or 4] in (0, 1): cx, cy(, w, h), normalized by the image's sides. w and h have no epsilon.
        scale: Tensor[..., 2 * num_feats], [..., 1], [2 * num_feats] or [1], content-dependent; None is 1.
        ref_size_logits: Tensor[..., 2], of the reference width and height: the width's ratio multiplies the x features,
            the height's the y features. None leaves the modulation out; it needs boxes of 4.
        num_feats: features per coordinate, even; DAB-DETR has d_model / 2.
        temperature: of the sine embedding, positive.
        order: of the features: "yxwh" as DAB-DETR, or "xywh".
        dtype: of the results; None is that of `boxes`.

    Returns:
        g, Tensor[..., 2 or 4 * num_feats], and the query's sine embedding, Tensor[..., 2 * num_feats]. What float16
        cannot hold, from tiny boxes, becomes its largest number.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
        BackendUnavailable: the backend chosen by name cannot run this.

    Follows equations 5 and 6 of DAB-DETR (arXiv 2201.12329) and models/DAB_DETR/transformer.py of
    IDEA-Research/DAB-DETR. Computed in float32 at least whatever the dtypes; dab_fast's kernels give the same bits from
    run to run.
    """
    _check_embedding("boxes", boxes, num_feats, order)
    temperature = constant(temperature)
    if boxes.shape[-1] not in (2, 4):
        raise ValueError(f"boxes must have shape [..., 2] or [..., 4], got {list(boxes.shape)}")
    if scale is not None:
        check_tensor("scale", scale, (None,), leading=True)
        width = 1 if scale.shape[-1] == 1 else 2 * num_feats
        check_tensor("scale", scale, (width,) if scale.dim() == 1 else (*boxes.shape[:-1], width), like=boxes)
    if ref_size_logits is not None:
        check_tensor("ref_size_logits", ref_size_logits, (*boxes.shape[:-1], 2), like=boxes)
        if boxes.shape[-1] != 4:
            raise ValueError(f"boxes must have shape [..., 4] for ref_size_logits, got {list(boxes.shape)}")
    dtype = dtype or boxes.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    backend = _backends.select("box_position_embed", boxes, dtype, num_feats, (boxes, scale, ref_size_logits))
    if backend == "torch":
        return reference.box_position_embed(
            boxes, scale, ref_size_logits, num_feats=num_feats, temperature=temperature, order=order, dtype=dtype
        )
    if scale is not None and scale.shape == (1,):
        # So that its gradient is summed in float32 at least.
        scale = at_least_float32(scale).expand(*boxes.shape[:-1], 1)
    args = (boxes, scale, ref_size_logits, num_feats, temperature, order, dtype, True, backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:3]):
        return _BoxPositionEmbed.apply(*args)
    sine, query_sine = _forward(*args)
    return sine, query_sine


def _fake_forward(
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None,  # [..., 2]
    num_feats: int,
    temperature: float,
    order: str,
    dtype: torch.dtype,
    query: bool,  # False: the sine embedding alone
    backend: str,
) -> list[Tensor]:  # [..., n * num_feats] and, with `query`, [..., 2 * num_feats]
    widths = (boxes.shape[-1], 2) if query else (boxes.shape[-1],)
    return [boxes.new_empty((*boxes.shape[:-1], n * num_feats), dtype=dtype) for n in widths]


def _fake_backward(
    d_sine: Tensor | None,  # [..., n * num_feats]
    d_query_sine: Tensor | None,  # [..., 2 * num_feats]
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,
    ref_size_logits: Tensor | None,
    num_feats: int,
    temperature: float,
    order: str,
    needs: list[bool],  # of the three
    backend: str,
) -> list[Tensor]:  # those needed of d_boxes, d_scale, d_ref_size_logits, as the inputs are
    inputs = (boxes, scale, ref_size_logits)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


_forward = define("box_position_embed", _fake_forward)
_backward = define("box_position_embed_backward", _fake_backward)


class _BoxPositionEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        boxes: Tensor,  # [..., n]
        scale: Tensor | None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
        ref_size_logits: Tensor | None,  # [..., 2]
        num_feats: int,
        temperature: float,
        order: str,
        dtype: torch.dtype,
        query: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(boxes, scale, ref_size_logits)
        ctx.set_materialize_grads(False)
        ctx.options = num_feats, temperature, order
        ctx.backend = backend
        return tuple(_forward(boxes, scale, ref_size_logits, num_feats, temperature, order, dtype, query, backend))

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, saved: tuple[Any, ...], d_sine: Tensor | None, d_query_sine: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needs = tuple(need and (d_query_sine is not None or x == 0) for x, need in enumerate(ctx.needs_input_grad[:3]))
        found = iter(_backward(d_sine, d_query_sine, *saved, *ctx.options, list(needs), ctx.backend))
        return (*(next(found) if need else None for need in needs), *(None,) * 6)


def _check_embedding(name: str, x: Tensor, num_feats: int, order: str) -> None:
    check_tensor(name, x, (None,), leading=True)
    if num_feats < 2 or num_feats % 2:
        raise ValueError(f"num_feats must be even and at least 2, got {num_feats}")
    if order not in ("yxwh", "xywh"):
        raise ValueError(f'order must be "yxwh" or "xywh", got {order!r}')
    if order == "yxwh" and x.shape[-1] < 2:
        raise ValueError(f'{name} must have shape [..., 2 or more] for order "yxwh", got {list(x.shape)}')
