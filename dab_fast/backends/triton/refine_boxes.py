"""The box update of one decoder layer in one launch: three linear layers, inverse sigmoid, sum, sigmoid.

    h1 = relu(W1 x + b1),   h2 = relu(W2 h1 + b2),   refined = σ(W3 h2 + b3 + σ⁻¹(box)).

A program owns BLOCK_M rows. It walks over h1 in slices of BLOCK_N columns: a slice is computed from x and W1, and at
once multiplied by its columns of W2 and added to h2, which stays in registers; so h1 is never whole, and the weights
stream through shared memory once per program. The backward is the mirror image: with δ = d_refined · refined ·
(1 - refined),

    dh2 = [h2 > 0] W3ᵀ δ,   dh1 = [h1 > 0] W2ᵀ dh2 (a slice at a time),   dx += W1ᵀ dh1,   dbox = δ dσ⁻¹.

It writes dh1 and dh2, so that W1 and W2 get their gradients from one cuBLAS product over all rows each, which splits
the rows better than a fixed tile could; the gradients of W3 and of the biases are summed per program, then over
programs. All of it in fp32 (`tf32x3` on tensor cores) whatever the dtype of x and the weights.
"""

from __future__ import annotations

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
from dab_fast.backends.triton._math import held, log, sigmoid


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a diverged model must not look sound


@triton.jit
def _inverse_sigmoid(x, EPS: tl.constexpr):
    """log(x / (1 - x)) with x in [0, 1], numerator and denominator at least eps."""
    x = tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))
    return log(tl.div_rn(tl.where(x < EPS, EPS, x), tl.where(1.0 - x < EPS, EPS, 1.0 - x)))


@triton.jit
def _inverse_sigmoid_slope(x, EPS: tl.constexpr, BOUNDS_PASS: tl.constexpr):
    """Its derivative: below eps the numerator is constant and the denominator is not, 1 / (1 - x)."""
    m_up, m_down = held(x, EPS, BOUNDS_PASS), held(1.0 - x, EPS, BOUNDS_PASS)
    up = tl.where(m_up, 0.0, tl.div_rn(1.0, tl.where(m_up, 1.0, x)))
    down = tl.where(m_down, 0.0, tl.div_rn(1.0, tl.where(m_down, 1.0, 1.0 - x)))
    return tl.where(held(x, 0.0, BOUNDS_PASS) | held(1.0 - x, 0.0, BOUNDS_PASS), 0.0, up + down)


@triton.jit(do_not_specialize=["rows", "s_boxes"])
def forward_kernel(
    p_hidden,  # [layers * rows, D]
    p_boxes,  # [layers * rows, COORDS]
    p_w1,  # [layers or 1, D, D]
    p_b1,  # [layers or 1, D]
    p_w2,
    p_b2,
    p_w3,  # [layers or 1, 4, D]
    p_b3,
    p_refined,  # [layers * rows, 4]
    p_h1,  # [layers * rows, D]
    p_h2,
    rows,
    s_hidden,
    s_boxes,
    EPS: tl.constexpr,
    D: tl.constexpr,
    COORDS: tl.constexpr,
    LAYERED: tl.constexpr,
    KEEP: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    layer = tl.program_id(1).to(tl.int64)
    o_row = layer * rows + o_m
    if LAYERED:
        p_w1 += layer * D * D
        p_w2 += layer * D * D
        p_w3 += layer * 4 * D
        p_b1 += layer * D
        p_b2 += layer * D
        p_b3 += layer * 4
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_h2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, D, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < D
        p_next = p_w2 + o_d[None, :] * D + o_n[:, None]
        b_w2 = tl.load(p_next, mask=m_d[None, :] & m_n[:, None], other=0.0).to(tl.float32)
        b_h1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, D, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < D
            p_x = p_hidden + o_row[:, None] * s_hidden + o_k[None, :]
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            p_w = p_w1 + o_n[None, :] * D + o_k[:, None]
            b_w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0).to(tl.float32)
            b_h1 = tl.dot(b_x, b_w, b_h1, input_precision=FIRST)
        b_bias = tl.load(p_b1 + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_h1 = _relu(b_h1 + b_bias[None, :])
        if KEEP:
            tl.store(p_h1 + o_row[:, None] * D + o_n[None, :], b_h1, mask=m_m[:, None] & m_n[None, :])
        b_h2 = tl.dot(b_h1, b_w2, b_h2, input_precision="tf32x3")
    b_bias = tl.load(p_b2 + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_h2 = _relu(b_h2 + b_bias[None, :])
    if KEEP:
        tl.store(p_h2 + o_row[:, None] * D + o_d[None, :], b_h2, mask=m_m[:, None] & m_d[None, :])
    for j in range(4):  # not unrolled, which would take the registers of four rows of W3
        b_w = tl.load(p_w3 + j * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_y = tl.sum(b_h2 * b_w[None, :], 1) + tl.load(p_b3 + j).to(tl.float32)
        b_box = tl.load(p_boxes + o_row * s_boxes + j, mask=m_m & (j < COORDS), other=0.5).to(tl.float32)
        tl.store(p_refined + o_row * 4 + j, sigmoid(b_y + _inverse_sigmoid(b_box, EPS)), mask=m_m)


@triton.jit(do_not_specialize=["rows", "s_boxes", "s_d_refined"])
def backward_kernel(
    p_d_refined,  # [layers * rows, 4]
    p_refined,  # [layers * rows, 4]
    p_boxes,  # [layers * rows, COORDS]
    p_h1,  # [layers * rows, D]
    p_h2,
    p_w1,  # [layers or 1, D, D]
    p_w2,
    p_w3,  # [layers or 1, 4, D]
    p_d_hidden,  # [layers * rows, D]
    p_d_boxes,  # [layers * rows, COORDS]
    p_d_h1,  # [layers * rows, D]
    p_d_h2,
    p_sums,  # [layers, programs, 6 * D + 4]: of W3, b1, b2, b3
    rows,
    s_d_refined,
    s_boxes,
    EPS: tl.constexpr,
    D: tl.constexpr,
    COORDS: tl.constexpr,
    LAYERED: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_BOXES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    BOUNDS_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    layer = tl.program_id(1).to(tl.int64)
    o_row = layer * rows + o_m
    if NEED_WEIGHTS:
        p_sums += (layer * tl.num_programs(0) + tl.program_id(0)) * (6 * D + 4)
    if LAYERED:
        p_w1 += layer * D * D
        p_w2 += layer * D * D
        p_w3 += layer * 4 * D
    # The 4 outputs in a tile of 16 columns, the narrowest that a dot takes.
    o_j = tl.arange(0, 16)
    m_j = o_j < 4
    m_mj = m_m[:, None] & m_j[None, :]
    b_y = tl.load(p_refined + o_row[:, None] * 4 + o_j[None, :], mask=m_mj, other=0.0)
    b_delta = tl.load(p_d_refined + o_row[:, None] * s_d_refined + o_j[None, :], mask=m_mj, other=0.0).to(tl.float32)
    b_delta *= b_y * (1.0 - b_y)
    if NEED_BOXES:
        m_box = m_m[:, None] & (o_j < COORDS)[None, :]
        b_box = tl.load(p_boxes + o_row[:, None] * s_boxes + o_j[None, :], mask=m_box, other=0.5).to(tl.float32)
        b_d_box = b_delta * _inverse_sigmoid_slope(b_box, EPS, BOUNDS_PASS)
        tl.store(p_d_boxes + o_row[:, None] * COORDS + o_j[None, :], b_d_box, mask=m_box)
    if NEED_WEIGHTS:
        tl.store(p_sums + 6 * D + o_j, tl.sum(b_delta, 0), mask=m_j)
    if NEED_WEIGHTS or NEED_HIDDEN:
        for k in range(0, D, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < D
            m_mk = m_m[:, None] & m_k[None, :]
            m_jk = m_j[:, None] & m_k[None, :]
            b_h2 = tl.load(p_h2 + o_row[:, None] * D + o_k[None, :], mask=m_mk, other=0.0)
            b_w = tl.load(p_w3 + o_j[:, None] * D + o_k[None, :], mask=m_jk, other=0.0).to(tl.float32)
            b_d_h2 = tl.where(b_h2 <= 0.0, 0.0, tl.dot(b_delta, b_w, input_precision="tf32x3"))
            tl.store(p_d_h2 + o_row[:, None] * D + o_k[None, :], b_d_h2, mask=m_mk)
            if NEED_WEIGHTS:
                b_d_w = tl.dot(tl.trans(b_delta), b_h2, input_precision="tf32x3")
                tl.store(p_sums + o_j[:, None] * D + o_k[None, :], b_d_w, mask=m_jk)
                tl.store(p_sums + 5 * D + o_k, tl.sum(b_d_h2, 0), mask=m_k)
        tl.debug_barrier()  # other threads of this program wrote what is read now
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_d_hidden = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in range(0, D, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < D
            m_mn = m_m[:, None] & m_n[None, :]
            if NEED_HIDDEN:
                p_next = p_w1 + o_n[:, None] * D + o_d[None, :]
                b_w1 = tl.load(p_next, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_d_h1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, D, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                m_k = o_k < D
                p_d = p_d_h2 + o_row[:, None] * D + o_k[None, :]
                b_d = tl.load(p_d, mask=m_m[:, None] & m_k[None, :], other=0.0)
                p_w = p_w2 + o_k[:, None] * D + o_n[None, :]
                b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32)
                b_d_h1 = tl.dot(b_d, b_w, b_d_h1, input_precision="tf32x3")
            b_h1 = tl.load(p_h1 + o_row[:, None] * D + o_n[None, :], mask=m_mn, other=0.0)
            b_d_h1 = tl.where(b_h1 <= 0.0, 0.0, b_d_h1)
            if NEED_WEIGHTS:
                tl.store(p_d_h1 + o_row[:, None] * D + o_n[None, :], b_d_h1, mask=m_mn)
                tl.store(p_sums + 4 * D + o_n, tl.sum(b_d_h1, 0), mask=m_n)
            if NEED_HIDDEN:
                b_d_hidden = tl.dot(b_d_h1, b_w1, b_d_hidden, input_precision="tf32x3")
        if NEED_HIDDEN:
            p_x = p_d_hidden + o_row[:, None] * D + o_d[None, :]
            tl.store(p_x, b_d_hidden, mask=m_m[:, None] & m_d[None, :])


def _options(rows: int, d: int, coords: int, eps: float, layered: bool, tall: bool) -> dict[str, Any]:
    """Tiles that spill no register on sm_80, sm_90 and sm_100 (`python -m benchmarks.kernel_budget`).

    Short ones while there are fewer tiles than multiprocessors. `tall` tiles have 64 rows, the height of a Hopper
    tensor-core instruction, for which only a forward in float32 that keeps no activations has the registers. The
    interpreter takes its time per program and loop, whatever their size.
    """
    width = max(16, triton.next_power_of_2(d))
    few = rows <= 2048
    warps = 4 if width <= 128 else 8
    if INTERPRET:
        m, n, k = 128, 64, 128
    elif width <= 128:
        m, n, k = 16 if few else 32, 32, 32
    elif width == 512:
        m, n, k = 16, 16, 64
    elif few:
        m, n, k = 16, 32, 64
    else:
        m, n, k = (64, 32, 16) if tall else (32, 32, 32)
    return {
        "EPS": eps,
        "D": d,
        "COORDS": coords,
        "LAYERED": layered,
        "BLOCK_M": m,
        "BLOCK_N": min(n, width),
        "BLOCK_K": min(k, width),
        "BLOCK_D": width,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def forward(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D], or [L, D, D] where hidden is [L, ..., D]; the others likewise
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    eps: float,
    keep: bool,
) -> list[Tensor]:  # [..., 4] and, with `keep`, h1 and h2 [..., D], all in float32
    d = hidden.shape[-1]
    refined = torch.empty((*hidden.shape[:-1], 4), dtype=torch.float32, device=hidden.device)
    results = [refined]
    if keep:
        results += [torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) for _ in range(2)]
    layers = w1.shape[0] if w1.dim() == 3 else 1
    rows = refined.numel() // (4 * layers) if layers else 0
    if rows == 0:
        return results
    options = _options(rows * layers, d, boxes.shape[-1], eps, w1.dim() == 3, not keep and w1.element_size() == 4)
    half = hidden.element_size() == 2 and w1.element_size() == 2  # tf32 holds such factors exactly
    hidden, s_hidden = rows_of(hidden)
    boxes, s_boxes = rows_of(boxes)
    with on_device_of(hidden):
        forward_kernel[(cdiv(rows, options["BLOCK_M"]), layers)](
            hidden,
            boxes,
            *(x.contiguous() for x in (w1, b1, w2, b2, w3, b3)),
            refined,
            *(results[1:] or (None, None)),
            rows,
            s_hidden,
            s_boxes,
            KEEP=keep,
            FIRST="tf32" if half else "tf32x3",
            **options,
        )
    return results


def backward(
    d_refined: Tensor,  # [..., 4]
    refined: Tensor,  # [..., 4]
    h1: Tensor,  # [..., D]
    h2: Tensor,  # [..., D]
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D] or [L, D, D]
    w2: Tensor,  # [D, D] or [L, D, D]
    w3: Tensor,  # [4, D] or [L, 4, D]
    eps: float,
    needs: list[bool],  # of hidden, boxes, the weights
) -> list[Tensor]:
    """Those needed of d_hidden; d_boxes; d_w1, d_w2 and [(L,) 6 * D + 4] of w3, b1, b2, b3 in float32."""
    need_hidden, need_boxes, need_weights = needs
    d = hidden.shape[-1]
    layers = w1.shape[0] if w1.dim() == 3 else 1
    rows = refined.numel() // (4 * layers) if layers else 0
    options = _options(rows * layers, d, boxes.shape[-1], eps, w1.dim() == 3, False)
    programs = cdiv(rows, options["BLOCK_M"])
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    d_boxes = torch.empty(boxes.shape, dtype=boxes.dtype, device=hidden.device) if need_boxes else None
    results = [x for x in (d_hidden, d_boxes) if x is not None]
    lead = w1.shape[:-2]
    d_h1 = sums = None
    d_h2 = torch.empty((*lead, rows, d), dtype=torch.float32, device=hidden.device)
    if need_weights:
        d_h1 = torch.empty_like(d_h2)
        sums = torch.empty((*lead, programs, 6 * d + 4), dtype=torch.float32, device=hidden.device)
    if rows:
        d_refined, s_d_refined = rows_of(d_refined)
        boxes, s_boxes = rows_of(boxes)
        with on_device_of(hidden):
            backward_kernel[(programs, layers)](
                d_refined,
                refined,
                boxes,
                h1,
                h2,
                w1.contiguous(),
                w2.contiguous(),
                w3.contiguous(),
                d_hidden,
                d_boxes,
                d_h1,
                d_h2,
                sums,
                rows,
                s_d_refined,
                s_boxes,
                NEED_HIDDEN=need_hidden,
                NEED_BOXES=need_boxes,
                NEED_WEIGHTS=need_weights,
                BOUNDS_PASS=precision.clamp_passes_at_bounds(),
                **options,
            )
    if d_h1 is not None and sums is not None:
        with precision.autocast_off(hidden):
            results += [
                (d_h1.mT @ hidden.reshape(d_h1.shape).float()).to(w1.dtype),
                (d_h2.mT @ h1.view(d_h1.shape)).to(w2.dtype),
                sums.sum(-2),
            ]
    return results


def compile_cases() -> list[CompileCase]:
    """Few rows and many, with the activations kept and not, of each width that has tiles of its own."""
    cases = []
    for d, element, rows in product((128, 256, 512), ("fp32", "bf16"), (300, 9600)):
        name = f"{d} {element} {'few' if rows == 300 else 'many'}"
        kept = {"p_h1": "fp32", "p_h2": "fp32"}
        weights = dict.fromkeys(("p_hidden", "p_w1", "p_b1", "p_w2", "p_b2", "p_w3", "p_b3", "p_d_hidden"), element)
        boxes = dict.fromkeys(("p_boxes", "p_refined", "p_d_refined", "p_d_boxes"), "fp32")
        sums = dict.fromkeys(("p_d_h1", "p_d_h2", "p_sums"), "fp32")
        first = {"FIRST": "tf32x3" if element == "fp32" else "tf32"}
        needs = {"NEED_HIDDEN": True, "NEED_BOXES": True, "NEED_WEIGHTS": True}
        needs["BOUNDS_PASS"] = precision.clamp_passes_at_bounds()
        usual = (d, element, rows) == (256, "fp32", 300)
        wide_loads = 0.6 if element == "fp32" else 0.5  # the smallest tiles have 8 bytes per thread
        cases += [
            CompileCase(
                name=f"refine_boxes forward {name}{' kept' * keep}",
                kernel=forward_kernel,
                pointers={**weights, **boxes, **(kept if keep else dict.fromkeys(kept))},
                floats=(),
                options={**_options(rows, d, 4, 1e-3, False, element == "fp32" and not keep), **first, "KEEP": keep},
                tensor_cores=True,
                default=usual and keep,
                wide_loads=wide_loads,
            )
            for keep in (False, True)
        ]
        cases.append(
            CompileCase(
                name=f"refine_boxes backward {name}",
                kernel=backward_kernel,
                pointers={**weights, **boxes, **kept, **sums},
                floats=(),
                options={**_options(rows, d, 4, 1e-3, False, False), **needs},
                tensor_cores=True,
                default=usual,
                wide_loads=wide_loads,
            )
        )
    return cases
