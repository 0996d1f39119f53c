"""Attention whose logits are a sum of two dot products, forward.

Per image and head, with a = scale · log2(e) and the rows of one query block in registers,

    z = q_content · k_contentᵀ + q_pos · k_posᵀ      two dots into one accumulator, nothing is concatenated
    m' = max(m, max z)                               online softmax over blocks of keys
    l' = l · 2^(a (m − m')) + Σ 2^(a (z − m'))
    o' = o · 2^(a (m − m')) + 2^(a (z − m')) · v     dropout thins the weights of this sum, not those of l
    out = o / l                                      out in fp32, m and log2 l are kept for the backward

The maximum is subtracted before the scale is multiplied in. a z − a m in one fused multiply-add saves an instruction,
but leaves the rounding error of a m in the exponent: at logits of 1e10, which a box of width 1e-12 makes, 2^±500.

m starts at a finite floor, so that a block without a single visible key adds exact zeros and no NaN: a row that sees
no key ends with l = 0 and out = 0; its log2 l is written as +inf, which makes its weights 0 in the backward. When there
are few query blocks the keys are split over programs, each of which writes its own out, m and log2 l in fp32; a second
kernel weighs them with l · 2^(a (m − max m)) in a fixed order.
"""

import triton
import triton.language as tl

from dab_fast.backends.triton._common import load_rows, store_rows, tile_width

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-1.0e38)
SCAN = tl.constexpr(2048)

# Sizes that vary from call to call, or are no multiples of 16 anyway: not to be compiled for anew.
UNALIGNED = ["BH", "H", "Q", "S", "split_size", "stride_padding_b", "stride_hidden_bh", "stride_hidden_q"]


@triton.jit
def visible_range(p_padding, begin, end):
    """The first and one past the last visible key of [begin, end): padded keys outside are skipped altogether."""
    first = end
    last = begin
    for start in tl.range(begin, end, SCAN, num_stages=1):
        o_s = start + tl.arange(0, SCAN)
        b_padded = tl.load(p_padding + o_s, mask=o_s < end, other=1) != 0
        first = tl.minimum(first, tl.min(tl.where(b_padded, end, o_s)))
        last = tl.maximum(last, tl.max(tl.where(b_padded, begin, o_s + 1)))
    return first, last


@triton.jit
def kept(p_rng, bh, o_q, o_s, dropout_p):
    """Which weights survive dropout: a function of (seed, offset, b·H + h, q, s) alone, whatever the tiles are."""
    seed = tl.load(p_rng)
    offset = tl.load(p_rng + 1).to(tl.int32)
    bits, _, _, _ = tl.philox(seed, o_s, o_q, bh, offset)
    return tl.random.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def visibility(
    p_padding,
    p_hidden,
    stride_hidden_q,
    o_row,
    rows,
    o_s,
    end,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TAIL: tl.constexpr,
):
    """What the logits start from: 0, or −inf for keys beyond the end, padded, or hidden by the attention mask.

    The dots add to it. Selecting after the dots instead would make the compiler carry the softmax in two layouts, that
    of the mask's load and that of the dots.
    """
    b_z = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    if TAIL:
        b_z = tl.where((o_s < end)[None, :], b_z, float("-inf"))
    if p_padding is not None:
        b_padded = tl.load(p_padding + o_s, mask=o_s < end, other=1) != 0
        b_z = tl.where(b_padded[None, :], float("-inf"), b_z)
    if p_hidden is not None:
        m_z = (o_row < rows)[:, None] & (o_s < end)[None, :]
        b_hidden = tl.load(p_hidden + o_row[:, None] * stride_hidden_q + o_s[None, :], mask=m_z, other=1) != 0
        b_z = tl.where(b_hidden, float("-inf"), b_z)
    return b_z


@triton.jit
def log_of_sum(b_l):
    """log2 l; +inf where no key was seen."""
    return tl.log2(tl.where(b_l == 0.0, float("inf"), b_l))


@triton.jit(do_not_specialize=UNALIGNED)
def forward_kernel(
    p_q_content,  # [B, Q, H, D]
    p_q_pos,  # [B, Q, H, DP] or None
    p_k_content,  # [B, S, H, D]
    p_k_pos,  # [B, S, H, DP] or None
    p_v,  # [B, S, H, DV]
    p_padding,  # [B, S] or None, nonzero = padded
    p_hidden,  # [B·H, Q, S] or None, nonzero = hidden
    p_rng,  # [2] int64 or None: seed, offset
    p_out,  # [splits, B, Q, H, DV]
    p_wide,  # the same in fp32, or None
    p_stats,  # [splits, 2, B, H, Q]: m, log2 l; or None
    stride_qc_b,
    stride_qc_q,
    stride_qc_h,
    stride_qp_b,
    stride_qp_q,
    stride_qp_h,
    stride_kc_b,
    stride_kc_s,
    stride_kc_h,
    stride_kp_b,
    stride_kp_s,
    stride_kp_h,
    stride_v_b,
    stride_v_s,
    stride_v_h,
    stride_padding_b,
    stride_hidden_bh,
    stride_hidden_q,
    BH,
    H,
    Q,
    S,
    split_size,  # keys per split
    scale,
    dropout_p,
    dropout_scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    bh = tl.program_id(0) // q_blocks
    split = tl.program_id(1)
    o_b = (bh // H).to(tl.int64)
    o_h = (bh % H).to(tl.int64)
    q_start = (tl.program_id(0) % q_blocks) * BLOCK_Q
    o_row = tl.arange(0, BLOCK_Q)
    o_q = q_start + o_row
    m_q = o_q < Q

    p_q_content += o_b * stride_qc_b + o_h * stride_qc_h
    b_q_content = load_rows(p_q_content, q_start, Q, stride_qc_q, BLOCK_Q, D, True, INTERPRET)
    p_k_content += o_b * stride_kc_b + o_h * stride_kc_h
    if p_q_pos is not None:
        p_q_pos += o_b * stride_qp_b + o_h * stride_qp_h
        b_q_pos = load_rows(p_q_pos, q_start, Q, stride_qp_q, BLOCK_Q, DP, True, INTERPRET)
        p_k_pos += o_b * stride_kp_b + o_h * stride_kp_h
    p_v += o_b * stride_v_b + o_h * stride_v_h

    begin = split * split_size
    end = tl.minimum(S, begin + split_size)
    if p_padding is not None:
        p_padding += o_b * stride_padding_b
        begin, end = visible_range(p_padding, begin, end)
    if p_hidden is not None:
        p_hidden += bh.to(tl.int64) * stride_hidden_bh + q_start.to(tl.int64) * stride_hidden_q
    whole_end = begin + (end - begin) // BLOCK_S * BLOCK_S

    to_log2 = tl.cast(scale, tl.float32) * LOG2E
    b_m = tl.full([BLOCK_Q], FLOOR, tl.float32)
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, tile_width(DV)], tl.float32)
    # First the whole blocks, which need no bounds, then the rest as one block that does.
    for TAIL in tl.static_range(2):
        for s_start in tl.range(
            whole_end if TAIL else begin,
            end if TAIL else whole_end,
            BLOCK_S,
            num_stages=1 if TAIL else STAGES,
        ):
            o_s = s_start + tl.arange(0, BLOCK_S)
            b_k = load_rows(p_k_content, s_start, end, stride_kc_s, BLOCK_S, D, TAIL, INTERPRET)
            b_z = visibility(p_padding, p_hidden, stride_hidden_q, o_row, Q - q_start, o_s, end, BLOCK_Q, BLOCK_S, TAIL)
            b_z = tl.dot(b_q_content, b_k.T, b_z, input_precision="ieee")
            if p_q_pos is not None:
                b_k = load_rows(p_k_pos, s_start, end, stride_kp_s, BLOCK_S, DP, TAIL, INTERPRET)
                b_z = tl.dot(b_q_pos, b_k.T, b_z, input_precision="ieee")

            b_m_new = tl.maximum(b_m, tl.max(b_z, 1))
            b_p = tl.exp2((b_z - b_m_new[:, None]) * to_log2)
            b_fade = tl.exp2((b_m - b_m_new) * to_log2)
            b_l = b_l * b_fade + tl.sum(b_p, 1)
            b_m = b_m_new
            if p_rng is not None:
                b_p = tl.where(kept(p_rng, bh, o_q[:, None], o_s[None, :], dropout_p), b_p, 0.0)
            b_v = load_rows(p_v, s_start, end, stride_v_s, BLOCK_S, DV, TAIL, INTERPRET)
            b_out = b_out * b_fade[:, None]
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")

    b_out = b_out * (tl.cast(dropout_scale, tl.float32) / tl.where(b_l == 0.0, 1.0, b_l))[:, None]
    o_out = ((split.to(tl.int64) * (BH // H) + o_b) * Q * H + o_h) * DV
    store_rows(p_out + o_out, q_start, Q, H * DV, b_out, BLOCK_Q, DV)
    if p_wide is not None:
        store_rows(p_wide + o_out, q_start, Q, H * DV, b_out, BLOCK_Q, DV)
    if p_stats is not None:
        p_stats += (split.to(tl.int64) * 2 * BH + bh) * Q + o_q
        tl.store(p_stats, b_m, mask=m_q)
        tl.store(p_stats + BH.to(tl.int64) * Q, log_of_sum(b_l), mask=m_q)


@triton.jit(do_not_specialize=UNALIGNED)
def combine_kernel(
    p_part_out,  # [SPLITS, B, Q, H, DV] fp32
    p_part_stats,  # [SPLITS, 2, B, H, Q]: m, log2 l
    p_out,  # [B, Q, H, DV]
    p_wide,  # the same in fp32, or None
    p_stats,  # [2, B, H, Q] or None
    BH,
    H,
    Q,
    scale,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SPLITS: tl.constexpr,
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    bh = (tl.program_id(0) // q_blocks).to(tl.int64)
    o_q = (tl.program_id(0) % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_col = tl.arange(0, tile_width(DV))
    m_q = o_q < Q
    m_out = m_q[:, None] & (o_col < DV)[None, :]
    stats_size = BH.to(tl.int64) * Q
    o_stats = bh * Q + o_q
    o_out = (((bh // H) * Q + o_q) * H + bh % H)[:, None] * DV + o_col[None, :]

    to_log2 = tl.cast(scale, tl.float32) * LOG2E
    b_m = tl.full([BLOCK_Q], FLOOR, tl.float32)
    for split in tl.static_range(SPLITS):
        b_m = tl.maximum(b_m, tl.load(p_part_stats + 2 * split * stats_size + o_stats, mask=m_q, other=0.0))
    b_l = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, tile_width(DV)], tl.float32)
    for split in tl.static_range(SPLITS):
        p_part = p_part_stats + 2 * split * stats_size + o_stats
        b_log_l = tl.load(p_part + stats_size, mask=m_q, other=0.0)
        b_log_l = tl.where(b_log_l == float("inf"), float("-inf"), b_log_l)
        b_weight = tl.exp2((tl.load(p_part, mask=m_q, other=0.0) - b_m) * to_log2 + b_log_l)
        b_l += b_weight
        b_out += b_weight[:, None] * tl.load(p_part_out + split * stats_size * DV + o_out, mask=m_out, other=0.0)
    b_out = b_out / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    if p_wide is not None:
        tl.store(p_wide + o_out, b_out, mask=m_out)
    if p_stats is not None:
        tl.store(p_stats + o_stats, b_m, mask=m_q)
        tl.store(p_stats + stats_size + o_stats, log_of_sum(b_l), mask=m_q)
