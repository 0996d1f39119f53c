"""Sine embedding of anchor boxes, and its scaled and size-modulated center half, in one launch.

With F features per coordinate, T the temperature and ω_j = T^(-2j/F), the features 2j and 2j + 1 of a coordinate c are
sin 2πω_j c and cos 2πω_j c. `sine` holds the features g of y, x, w, h (or x, y, w, h); `query_sine` those of y and x
times a scale s and a modulation m = σ(r_h)/h on the y half, σ(r_w)/w on the x half. The backward recomputes g: with G
and Q the gradients of the two results and sums over a row's features,

    ds = Q g m,   dm = Σ Q g s,   dr = dm σ'(r)/size,   dsize = -dm m/size + its own sine part,
    dc = Σ (G + Q s m) dg/dc,   dg/dc = 2πω (cos 2πωc, -sin 2πωc).

One program owns whole rows, so the sums are register reductions. The gradient of a scale row that all boxes share is
summed per program, then over programs: no atomics, the same bits in every run.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dab_fast import precision
from dab_fast.backends.triton._cases import CompileCase
from dab_fast.backends.triton._common import INTERPRET
from dab_fast.backends.triton._launch import cdiv, on_device_of, rows_of
from dab_fast.backends.triton._math import exp, held, sigmoid, sin_cos_turns


@triton.jit
def _sine_cosine(b_c, DECAY: tl.constexpr, PAIRS: tl.constexpr):
    """ω [PAIRS], sin 2πωc and cos 2πωc [ROWS, PAIRS] of coordinates c [ROWS]; ω_j = exp(-DECAY j)."""
    b_omega = exp(tl.arange(0, PAIRS).to(tl.float32) * -DECAY)
    b_sin, b_cos = sin_cos_turns(b_c[:, None] * b_omega[None, :])
    return b_omega, b_sin, b_cos


@triton.jit
def _load_scale(p_scale, s_scale, o_row, m_row, o_q, m_q, SCALE: tl.constexpr):
    """The scale of a tile in fp32, [ROWS, FEATS] or broadcastable to it: of each element, of a row, or of a feature."""
    if SCALE == "per_element":
        p_s = p_scale + o_row[:, None] * s_scale + o_q[None, :]
        return tl.load(p_s, mask=m_row[:, None] & m_q[None, :], other=0.0).to(tl.float32)
    elif SCALE == "per_box":
        return tl.load(p_scale + o_row * s_scale, mask=m_row, other=0.0).to(tl.float32)[:, None]
    else:
        return tl.load(p_scale + o_q, mask=m_q, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _saturate(x, dtype: tl.constexpr):
    """What is finite in fp32 stays finite in float16."""
    if dtype == tl.float16:
        return tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    else:
        return x


@triton.jit(do_not_specialize=["rows", "s_boxes", "s_logits"])
def forward_kernel(
    p_boxes,  # [rows, COORDS]
    p_scale,  # [rows, 2 * NUM_FEATS], [rows, 1] or [2 * NUM_FEATS], as SCALE says
    p_logits,  # [rows, 2]
    p_sine,  # [rows, COORDS * NUM_FEATS]
    p_query,  # [rows, 2 * NUM_FEATS]
    rows,
    s_boxes,
    s_scale,
    s_logits,
    COORDS: tl.constexpr,
    NUM_FEATS: tl.constexpr,
    DECAY: tl.constexpr,
    SWAP: tl.constexpr,
    QUERY: tl.constexpr,
    SCALE: tl.constexpr,
    MODULATE: tl.constexpr,
    ROWS: tl.constexpr,
    FEATS: tl.constexpr,
):
    slot = tl.program_id(1)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_f = tl.arange(0, FEATS)
    m_f = o_f < NUM_FEATS
    m = m_row[:, None] & m_f[None, :]
    o_f += slot * NUM_FEATS
    col = slot
    if SWAP:
        col = tl.where(slot < 2, 1 - slot, slot)
    b_c = tl.load(p_boxes + o_row * s_boxes + col, mask=m_row, other=0.0).to(tl.float32)
    _, b_sin, b_cos = _sine_cosine(b_c, DECAY, FEATS // 2)
    b_g = tl.interleave(b_sin, b_cos)
    tl.store(p_sine + o_row[:, None] * (COORDS * NUM_FEATS) + o_f[None, :], b_g, mask=m)
    if QUERY and slot < 2:
        if SCALE != "none":
            b_g *= _load_scale(p_scale, s_scale, o_row, m_row, o_f, m_f, SCALE)
        if MODULATE:
            b_r = sigmoid(tl.load(p_logits + o_row * s_logits + col, mask=m_row, other=0.0).to(tl.float32))
            b_size = tl.load(p_boxes + o_row * s_boxes + col + 2, mask=m_row, other=1.0).to(tl.float32)
            b_g *= (b_r / b_size)[:, None]
        b_g = _saturate(b_g, p_query.dtype.element_ty)
        tl.store(p_query + o_row[:, None] * (2 * NUM_FEATS) + o_f[None, :], b_g, mask=m)


@triton.jit(do_not_specialize=["rows", "s_boxes", "s_logits"])
def backward_kernel(
    p_d_sine,  # [rows, COORDS * NUM_FEATS]
    p_d_query,  # [rows, 2 * NUM_FEATS]
    p_boxes,
    p_scale,
    p_logits,
    p_d_boxes,  # [rows, COORDS]
    p_d_scale,  # as scale; [programs, 2 * NUM_FEATS] in fp32 where SCALE is "shared"
    p_d_logits,  # [rows, 2]
    rows,
    s_d_sine,
    s_d_query,
    s_boxes,
    s_scale,
    s_logits,
    COORDS: tl.constexpr,
    NUM_FEATS: tl.constexpr,
    DECAY: tl.constexpr,
    SWAP: tl.constexpr,
    SINE: tl.constexpr,
    QUERY: tl.constexpr,
    SCALE: tl.constexpr,
    MODULATE: tl.constexpr,
    NEED_BOXES: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    BOUNDS_PASS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    m_f = tl.arange(0, FEATS) < NUM_FEATS
    m = m_row[:, None] & m_f[None, :]
    b_d_scale = tl.zeros([ROWS], tl.float32)
    # A size's gradient arrives with the slot of its center coordinate and waits for the slot of its own sine part.
    b_d_w = tl.zeros([ROWS], tl.float32)
    b_d_h = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(COORDS if NEED_BOXES and (SINE or COORDS == 2) else 2):
        col = 1 - slot if SWAP and slot < 2 else slot
        o_f = slot * NUM_FEATS + tl.arange(0, FEATS)
        b_c = tl.load(p_boxes + o_row * s_boxes + col, mask=m_row, other=0.0).to(tl.float32)
        b_omega, b_sin, b_cos = _sine_cosine(b_c, DECAY, FEATS // 2)
        b_d_g = tl.zeros([ROWS, FEATS], tl.float32)
        if SINE:
            p_g = p_d_sine + o_row[:, None] * s_d_sine + o_f[None, :]
            b_d_g = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
        if QUERY and slot < 2:
            p_q = p_d_query + o_row[:, None] * s_d_query + o_f[None, :]
            b_d_q = tl.load(p_q, mask=m, other=0.0).to(tl.float32)
            b_g = tl.interleave(b_sin, b_cos)
            if SCALE != "none":
                b_s = _load_scale(p_scale, s_scale, o_row, m_row, o_f, m_f, SCALE)
            if MODULATE:
                b_r = sigmoid(tl.load(p_logits + o_row * s_logits + col, mask=m_row, other=0.0).to(tl.float32))
                b_size = tl.load(p_boxes + o_row * s_boxes + col + 2, mask=m_row, other=1.0).to(tl.float32)
                b_m = b_r / b_size
            if p_d_query.dtype.element_ty == tl.float16:  # what was saturated is constant
                b_q = b_g * b_s if SCALE != "none" else b_g
                b_q = b_q * b_m[:, None] if MODULATE else b_q
                b_d_q = tl.where(held(-tl.abs(b_q), -65504.0, BOUNDS_PASS), 0.0, b_d_q)
            b_d_qg = b_d_q * b_g
            if MODULATE:
                b_d_q *= b_m[:, None]
            if NEED_SCALE:
                b_d_s = b_d_qg * b_m[:, None] if MODULATE else b_d_qg
                if SCALE == "per_element":
                    tl.store(p_d_scale + o_row[:, None] * (2 * NUM_FEATS) + o_f[None, :], b_d_s, mask=m)
                elif SCALE == "per_box":
                    b_d_scale += tl.sum(b_d_s, 1)
                else:
                    p_s = p_d_scale + tl.program_id(0) * (2 * NUM_FEATS) + o_f
                    tl.store(p_s, tl.sum(b_d_s, 0), mask=m_f)
            if SCALE != "none":
                b_d_q *= b_s
                b_d_qg *= b_s
            b_d_g += b_d_q
            if MODULATE:
                b_d_m = tl.sum(b_d_qg, 1)
                if NEED_LOGITS:
                    tl.store(p_d_logits + o_row * 2 + col, b_d_m * b_m * (1.0 - b_r), mask=m_row)
                if (slot == 1) == SWAP:  # x
                    b_d_w = -b_d_m * b_m / b_size
                else:
                    b_d_h = -b_d_m * b_m / b_size
        if NEED_BOXES:
            b_d_even, b_d_odd = tl.split(tl.reshape(b_d_g, [ROWS, FEATS // 2, 2]))
            b_d_c = tl.sum((b_d_even * b_cos - b_d_odd * b_sin) * (b_omega * 6.283185307179586)[None, :], 1)
            if slot == 2:
                b_d_c += b_d_w
            elif slot == 3:
                b_d_c += b_d_h
            tl.store(p_d_boxes + o_row * COORDS + col, b_d_c, mask=m_row)
    if NEED_BOXES and not SINE and COORDS == 4:
        tl.store(p_d_boxes + o_row * 4 + 2, b_d_w, mask=m_row)
        tl.store(p_d_boxes + o_row * 4 + 3, b_d_h, mask=m_row)
    if NEED_SCALE and SCALE == "per_box":
        tl.store(p_d_scale + o_row, b_d_scale, mask=m_row)


def _scale_kind(boxes: Tensor, scale: Tensor | None) -> str:
    if scale is None:
        return "none"
    if scale.shape[-1] == 1:
        return "per_box"
    return "per_element" if scale.dim() == boxes.dim() else "shared"


def _options(rows: int, num_feats: int, temperature: float, order: str, backward: bool) -> dict[str, Any]:
    """Few rows are spread over the chip; many rows share the frequencies, which cost as much as a row's sines.

    The interpreter takes its time per program, whatever its size.
    """
    feats = triton.next_power_of_2(num_feats)
    tile = 16384 if INTERPRET else 2048 if rows > 2048 else 256 if backward else 512
    return {
        "NUM_FEATS": num_feats,
        "DECAY": 2 * math.log(temperature) / num_feats,
        "SWAP": order == "yxwh",
        "ROWS": max(1, tile // feats),
        "FEATS": feats,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def forward(
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None,  # [..., 2]
    num_feats: int,
    temperature: float,
    order: str,
    dtype: torch.dtype,
    query: bool,
) -> list[Tensor]:  # [..., n * num_feats] and, with `query`, [..., 2 * num_feats]
    *lead, coords = boxes.shape
    rows = math.prod(lead)
    sine = torch.empty((*lead, coords * num_feats), dtype=dtype, device=boxes.device)
    results = [sine]
    if query:
        results.append(torch.empty((*lead, 2 * num_feats), dtype=dtype, device=boxes.device))
    if rows == 0:
        return results
    kind = _scale_kind(boxes, scale)
    options = _options(rows, num_feats, temperature, order, False)
    boxes, s_boxes = rows_of(boxes)
    scale, s_scale = (None, 0) if scale is None else rows_of(scale)
    logits, s_logits = (None, 0) if ref_size_logits is None else rows_of(ref_size_logits)
    with on_device_of(boxes):
        forward_kernel[(cdiv(rows, options["ROWS"]), coords)](
            boxes,
            scale,
            logits,
            sine,
            results[-1],
            rows,
            s_boxes,
            s_scale,
            s_logits,
            COORDS=coords,
            QUERY=query,
            SCALE=kind,
            MODULATE=logits is not None,
            **options,
        )
    return results


def backward(
    d_sine: Tensor | None,  # [..., n * num_feats]
    d_query_sine: Tensor | None,  # [..., 2 * num_feats]
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,
    ref_size_logits: Tensor | None,
    num_feats: int,
    temperature: float,
    order: str,
    needs: list[bool],  # of boxes, scale, ref_size_logits
) -> list[Tensor]:  # those needed of d_boxes, d_scale, d_ref_size_logits, as the inputs are
    need_boxes, need_scale, need_logits = needs
    *lead, coords = boxes.shape
    rows = math.prod(lead)
    kind = _scale_kind(boxes, scale)
    options = _options(rows, num_feats, temperature, order, True)
    programs = cdiv(rows, options["ROWS"])
    d_boxes = torch.empty_like(boxes, memory_format=torch.contiguous_format) if need_boxes else None
    d_scale = d_logits = None
    if need_scale and scale is not None:
        shape, dtype = ((programs, 2 * num_feats), torch.float32) if kind == "shared" else (scale.shape, scale.dtype)
        d_scale = torch.empty(shape, dtype=dtype, device=boxes.device)
    if need_logits and ref_size_logits is not None:
        d_logits = torch.empty_like(ref_size_logits, memory_format=torch.contiguous_format)
    if rows:
        boxes, s_boxes = rows_of(boxes)
        p_scale, s_scale = (None, 0) if scale is None else rows_of(scale)
        logits, s_logits = (None, 0) if ref_size_logits is None else rows_of(ref_size_logits)
        d_sine, s_d_sine = (None, 0) if d_sine is None else rows_of(d_sine)
        d_query, s_d_query = (None, 0) if d_query_sine is None else rows_of(d_query_sine)
        with on_device_of(boxes):
            backward_kernel[(programs,)](
                d_sine,
                d_query,
                boxes,
                p_scale,
                logits,
                d_boxes,
                d_scale,
                d_logits,
                rows,
                s_d_sine,
                s_d_query,
                s_boxes,
                s_scale,
                s_logits,
                COORDS=coords,
                SINE=d_sine is not None,
                QUERY=d_query is not None,
                SCALE=kind,
                MODULATE=logits is not None,
                NEED_BOXES=need_boxes,
                NEED_SCALE=need_scale,
                NEED_LOGITS=need_logits,
                BOUNDS_PASS=precision.clamp_passes_at_bounds(),
                **options,
            )
    if scale is not None and d_scale is not None and kind == "shared":
        d_scale = d_scale.sum(0).to(scale.dtype)
    return [x for x in (d_boxes, d_scale, d_logits) if x is not None]


def compile_cases() -> list[CompileCase]:
    """The decoder's call, first layer and others, few rows and many; the embedding alone."""
    cases = []
    for rows, element, scale in product(
        (300, 9600), ("fp32", "bf16"), ("per_element", "per_box", "shared", "none", "alone")
    ):
        query = scale != "alone"
        given = query and scale != "none"
        pointers = {
            **dict.fromkeys(("p_boxes", "p_d_boxes"), "fp32"),
            **dict.fromkeys(("p_sine", "p_d_sine"), element),
            **dict.fromkeys(("p_query", "p_d_query", "p_logits", "p_d_logits"), element if query else None),
            "p_scale": element if given else None,
            "p_d_scale": (element if scale != "shared" else "fp32") if given else None,
        }
        options = {
            "COORDS": 4,
            "QUERY": query,
            "SCALE": scale if given else "none",
            "MODULATE": query,
        }
        needs = {"SINE": True, "NEED_BOXES": True, "NEED_SCALE": given, "NEED_LOGITS": query}
        needs["BOUNDS_PASS"] = precision.clamp_passes_at_bounds()
        name = f"{scale} {element} {'few' if rows == 300 else 'many'}"
        for kernel, more in ((forward_kernel, {}), (backward_kernel, needs)):
            cases.append(
                CompileCase(
                    name=f"box_position_embed {'backward' if more else 'forward'} {name}",
                    kernel=kernel,
                    pointers=pointers,
                    floats=(),
                    options={**_options(rows, 128, 10000.0, "yxwh", bool(more)), **options, **more},
                    tensor_cores=False,
                    default=(scale, element, rows) == ("per_element", "fp32", 300),
                    wide_loads=1.0 if rows > 300 else 0.0,  # a small call has no 16 bytes per thread
                )
            )
    return cases
