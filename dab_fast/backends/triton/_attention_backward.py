"""Attention whose logits are a sum of two dot products, backward.

With P = 2^(a (z − m) − log2 l) recomputed from m and log2 l, which the forward kept (`_attention_forward` says what z,
a, m and l are; two numbers, because their sum, the log-sum-exp, would lose l to the rounding of a large m), R = dropout
(0 where a weight was dropped, 1 / (1 − p) elsewhere, 1 without dropout), and D = rowsum(d_out ∘ out) from out in fp32
(where attention is sharp d_out · vᵀ − D cancels, and would leave what rounding out to half precision had lost),

    dv = (R ∘ P)ᵀ · d_out
    dz = P ∘ (R ∘ (d_out · vᵀ) − D)
    dq_content = scale · dz · k_content,   dk_content = scale · dzᵀ · q_content,   and the same with pos

Where attention is sharp, or logits are large, that is not enough in fp32. z differs in its last bits from the forward's
(another tile, another order), which at |a z| = 1e6 changes P by a tenth, and D rounds otherwise than d_out · vᵀ, which
is as large as dz itself where one key has nearly all the weight. So a block of queries with such a row computes m, l
and D = Σ P ∘ R ∘ (d_out · vᵀ) anew, with the very z and d_out · vᵀ that its gradients will take: the first kernel in
a pass of its own over the keys, and for the second, whose tiles are transposed, a third kernel that lays them out as it
does. In half precision the rounding of z is far below that of its operands, and D is the forward's.

Two kernels, each the sole writer of what it writes, so that the sums have one order and need no atomics. The first
walks over the keys for one block of queries: D, dq_content, dq_pos. The second walks over the queries for one block of
keys on transposed tiles: dk_content, dk_pos, dv. There a padded key is a row that no other row reads, so padding is
one select after the loop, and a block of padded keys alone skips the loop.

A k_pos that all images share gets its gradient per image in fp32, summed afterwards. Walking over the images inside
the kernel would save that buffer but leave B times fewer programs (136 at S = 1050, 8 heads: one per SM), each B times
as long; the buffer costs 34 MB at B = 32, S = 1050, which is some 20 µs of an H100's memory bandwidth.
"""

import triton
import triton.language as tl

from dab_fast.backends.triton._attention_forward import (
    FLOOR,
    LOG2E,
    UNALIGNED,
    kept,
    log_of_sum,
    visibility,
    visible_range,
)
from dab_fast.backends.triton._common import load_rows, store_rows, tile_width

# Sums are computed anew where a logit times log2(e) is larger than the first (its rounding would change P by 1e-4), or
# where log2 l is below the second (one key has 0.98 of the weight, so that D cancels to a fiftieth).
LARGE = tl.constexpr(1024.0)
SHARP_LOG_L = tl.constexpr(0.03125)


@triton.jit
def is_sharp(b_m, b_log_l, m_q, to_log2):
    """Whether a row of the block needs sums of its own; one that sees no key, whose log2 l is +inf, does not."""
    b_sharp = (b_log_l < SHARP_LOG_L) | ((tl.abs(b_m) * to_log2 > LARGE) & (b_log_l < float("inf")))
    return tl.max((b_sharp & m_q).to(tl.int32), 0) > 0


@triton.jit
def add_block(b_m, b_l, b_d, b_z, b_dp, to_log2, AXIS: tl.constexpr):
    """m, l and l · D after another block of keys, which lie along AXIS."""
    b_m_new = tl.maximum(b_m, tl.max(b_z, AXIS))
    b_p = tl.exp2((b_z - tl.expand_dims(b_m_new, AXIS)) * to_log2)
    b_fade = tl.exp2((b_m - b_m_new) * to_log2)
    return b_m_new, b_l * b_fade + tl.sum(b_p, AXIS), b_d * b_fade + tl.sum(b_p * b_dp, AXIS)


@triton.jit
def mean_of(b_d, b_l):
    """D, 0 where no key was seen."""
    return b_d / tl.where(b_l == 0.0, 1.0, b_l)


@triton.jit
def transposed_visibility(p_hidden, stride_hidden_q, q_start, o_key, o_row, m_s, m_q, BLOCK_Q, BLOCK_S):
    """What z starts from: 0, or −inf where the attention mask hides a key from a query."""
    b_z = tl.zeros([BLOCK_S, BLOCK_Q], tl.float32)
    if p_hidden is not None:
        p_tile = (
            p_hidden + tl.cast(q_start, tl.int64) * stride_hidden_q + o_key[:, None] + o_row[None, :] * stride_hidden_q
        )
        b_hidden = tl.load(p_tile, mask=m_s[:, None] & m_q[None, :], other=1) != 0
        b_z = tl.where(b_hidden, float("-inf"), b_z)
    return b_z


@triton.jit
def weights(b_z, b_m, b_log_l, to_log2):
    """P; never above 1, though logits beyond 1e6 may be rounded otherwise than in the forward. NaN stays NaN."""
    return tl.exp2(tl.minimum((b_z - b_m) * to_log2 - b_log_l, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=UNALIGNED)
def backward_query_kernel(
    p_q_content,  # [B, Q, H, D]
    p_q_pos,  # [B, Q, H, DP] or None
    p_k_content,  # [B, S, H, D]
    p_k_pos,  # [B, S, H, DP] or None
    p_v,  # [B, S, H, DV]
    p_padding,  # [B, S] or None, nonzero = padded
    p_hidden,  # [B·H, Q, S] or None, nonzero = hidden
    p_rng,  # [2] int64 or None: seed, offset
    p_out,  # [B, Q, H, DV] in fp32
    p_stats,  # [2, B, H, Q]: m, log2 l
    p_d_out,  # [B, Q, H, DV]
    p_delta,  # [B, H, Q], written: D; or None
    p_dq_content,  # [B, Q, H, D] or None, written
    p_dq_pos,  # [B, Q, H, DP] or None, written
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
    stride_do_b,
    stride_do_q,
    stride_do_h,
    stride_padding_b,
    stride_hidden_bh,
    stride_hidden_q,
    BH,
    H,
    Q,
    S,
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
    SHARP: tl.constexpr,  # 1: sums of their own where attention is sharp; 0: never
):
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    bh = tl.program_id(0) // q_blocks
    o_b = (bh // H).to(tl.int64)
    o_h = (bh % H).to(tl.int64)
    q_start = (tl.program_id(0) % q_blocks) * BLOCK_Q
    q_far = q_start.to(tl.int64)
    o_row = tl.arange(0, BLOCK_Q)
    o_q = q_start + o_row
    m_q = o_q < Q

    p_d_out += o_b * stride_do_b + o_h * stride_do_h
    b_d_out = load_rows(p_d_out, q_start, Q, stride_do_q, BLOCK_Q, DV, True, INTERPRET)
    b_out = load_rows(p_out + (o_b * Q * H + o_h) * DV, q_start, Q, H * DV, BLOCK_Q, DV, True, INTERPRET)
    b_delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)
    o_stat = bh.to(tl.int64) * Q + o_q
    stats_size = BH.to(tl.int64) * Q
    if p_delta is not None:
        tl.store(p_delta + o_stat, b_delta, mask=m_q)

    if p_dq_content is not None or p_dq_pos is not None:
        b_m = tl.load(p_stats + o_stat, mask=m_q, other=0.0)
        b_log_l = tl.load(p_stats + stats_size + o_stat, mask=m_q, other=0.0)
        p_q_content += o_b * stride_qc_b + o_h * stride_qc_h
        b_q_content = load_rows(p_q_content, q_start, Q, stride_qc_q, BLOCK_Q, D, True, INTERPRET)
        p_k_content += o_b * stride_kc_b + o_h * stride_kc_h
        if p_q_pos is not None:
            p_q_pos += o_b * stride_qp_b + o_h * stride_qp_h
            b_q_pos = load_rows(p_q_pos, q_start, Q, stride_qp_q, BLOCK_Q, DP, True, INTERPRET)
            p_k_pos += o_b * stride_kp_b + o_h * stride_kp_h
        p_v += o_b * stride_v_b + o_h * stride_v_h

        begin = 0
        end = S
        if p_padding is not None:
            p_padding += o_b * stride_padding_b
            begin, end = visible_range(p_padding, begin, end)
        if p_hidden is not None:
            p_hidden += bh.to(tl.int64) * stride_hidden_bh + q_far * stride_hidden_q
        whole_end = begin + (end - begin) // BLOCK_S * BLOCK_S

        to_log2 = tl.cast(scale, tl.float32) * LOG2E
        keep = tl.cast(dropout_scale, tl.float32)
        b_dq_content = tl.zeros([BLOCK_Q, tile_width(D)], tl.float32)
        b_dq_pos = tl.zeros([BLOCK_Q, tile_width(DP)], tl.float32)
        if SHARP:
            sharp = is_sharp(b_m, b_log_l, m_q, to_log2)
            b_own_m = tl.full([BLOCK_Q], FLOOR, tl.float32)
            b_own_l = tl.zeros([BLOCK_Q], tl.float32)
            b_own_d = tl.zeros([BLOCK_Q], tl.float32)
        # Pass 0, where there is one, computes the sums of sharp rows, pass 1 the gradients.
        for PASS in tl.static_range(1 - SHARP, 2):
            for TAIL in tl.static_range(2):
                start = whole_end if TAIL else begin
                stop = end if TAIL else whole_end
                if PASS == 0:
                    stop = tl.where(sharp, stop, start)
                for s_start in tl.range(start, stop, BLOCK_S, num_stages=1 if TAIL else STAGES):
                    o_s = s_start + tl.arange(0, BLOCK_S)
                    b_k_content = load_rows(p_k_content, s_start, end, stride_kc_s, BLOCK_S, D, TAIL, INTERPRET)
                    b_z = visibility(
                        p_padding, p_hidden, stride_hidden_q, o_row, Q - q_start, o_s, end, BLOCK_Q, BLOCK_S, TAIL
                    )
                    b_z = tl.dot(b_q_content, b_k_content.T, b_z, input_precision="ieee")
                    if p_q_pos is not None:
                        b_k_pos = load_rows(p_k_pos, s_start, end, stride_kp_s, BLOCK_S, DP, TAIL, INTERPRET)
                        b_z = tl.dot(b_q_pos, b_k_pos.T, b_z, input_precision="ieee")
                    if PASS == 1:
                        b_p = weights(b_z, b_m[:, None], b_log_l[:, None], to_log2)

                    b_v = load_rows(p_v, s_start, end, stride_v_s, BLOCK_S, DV, TAIL, INTERPRET)
                    b_dp = tl.dot(b_d_out, b_v.T, input_precision="ieee")
                    if p_rng is not None:
                        b_dp = tl.where(kept(p_rng, bh, o_q[:, None], o_s[None, :], dropout_p), b_dp * keep, 0.0)
                    if PASS == 0:
                        b_own_m, b_own_l, b_own_d = add_block(b_own_m, b_own_l, b_own_d, b_z, b_dp, to_log2, 1)
                    else:
                        b_dz = (b_p * (b_dp - b_delta[:, None])).to(b_k_content.dtype)
                        if p_dq_content is not None:
                            b_dq_content = tl.dot(b_dz, b_k_content, b_dq_content, input_precision="ieee")
                        if p_dq_pos is not None:
                            b_dq_pos = tl.dot(b_dz, b_k_pos, b_dq_pos, input_precision="ieee")
            if PASS == 0:
                b_m = tl.where(sharp, b_own_m, b_m)
                b_log_l = tl.where(sharp, log_of_sum(b_own_l), b_log_l)
                b_delta = tl.where(sharp, mean_of(b_own_d, b_own_l), b_delta)

        b_scale = tl.cast(scale, tl.float32)
        o_head = o_b * Q * H + o_h
        if p_dq_content is not None:
            store_rows(p_dq_content + o_head * D, q_start, Q, H * D, b_dq_content * b_scale, BLOCK_Q, D)
        if p_dq_pos is not None:
            store_rows(p_dq_pos + o_head * DP, q_start, Q, H * DP, b_dq_pos * b_scale, BLOCK_Q, DP)


@triton.jit(do_not_specialize=UNALIGNED)
def backward_rows_kernel(
    p_q_content,  # [B, Q, H, D]
    p_q_pos,  # [B, Q, H, DP] or None
    p_k_content,  # [B, S, H, D]
    p_k_pos,  # [B, S, H, DP] or None
    p_v,  # [B, S, H, DV]
    p_padding,  # [B, S] or None, nonzero = padded
    p_hidden,  # [B·H, Q, S] or None, nonzero = hidden
    p_rng,  # [2] int64 or None: seed, offset
    p_out,  # [B, Q, H, DV] in fp32
    p_stats,  # [2, B, H, Q]: m, log2 l
    p_d_out,  # [B, Q, H, DV]
    p_rows,  # [3, B, H, Q], written: m, log2 l, D
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
    stride_do_b,
    stride_do_q,
    stride_do_h,
    stride_padding_b,
    stride_hidden_bh,
    stride_hidden_q,
    BH,
    H,
    Q,
    S,
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
    """What the second kernel reads of a row: the forward's, or where attention is sharp sums over tiles as its own."""
    q_blocks = tl.cdiv(Q, BLOCK_Q)
    bh = tl.program_id(0) // q_blocks
    o_b = (bh // H).to(tl.int64)
    o_h = (bh % H).to(tl.int64)
    q_start = (tl.program_id(0) % q_blocks) * BLOCK_Q
    o_row = tl.arange(0, BLOCK_Q)
    o_q = q_start + o_row
    m_q = o_q < Q

    p_d_out += o_b * stride_do_b + o_h * stride_do_h
    b_d_out = load_rows(p_d_out, q_start, Q, stride_do_q, BLOCK_Q, DV, True, INTERPRET)
    b_out = load_rows(p_out + (o_b * Q * H + o_h) * DV, q_start, Q, H * DV, BLOCK_Q, DV, True, INTERPRET)
    b_delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)
    o_stat = bh.to(tl.int64) * Q + o_q
    stats_size = BH.to(tl.int64) * Q
    b_m = tl.load(p_stats + o_stat, mask=m_q, other=0.0)
    b_log_l = tl.load(p_stats + stats_size + o_stat, mask=m_q, other=0.0)

    to_log2 = tl.cast(scale, tl.float32) * LOG2E
    sharp = is_sharp(b_m, b_log_l, m_q, to_log2)
    if sharp:
        p_q_content += o_b * stride_qc_b + o_h * stride_qc_h
        p_k_content += o_b * stride_kc_b + o_h * stride_kc_h
        if p_q_pos is not None:
            p_q_pos += o_b * stride_qp_b + o_h * stride_qp_h
            p_k_pos += o_b * stride_kp_b + o_h * stride_kp_h
        p_v += o_b * stride_v_b + o_h * stride_v_h
        keep = tl.cast(dropout_scale, tl.float32)
        b_own_m = tl.full([BLOCK_Q], FLOOR, tl.float32)
        b_own_l = tl.zeros([BLOCK_Q], tl.float32)
        b_own_d = tl.zeros([BLOCK_Q], tl.float32)
        for s_start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
            o_key = tl.arange(0, BLOCK_S)
            o_s = s_start + o_key
            m_s = o_s < S
            # Loaded for every block, since held over the loop they would not fit into the registers.
            b_q_content = load_rows(p_q_content, q_start, Q, stride_qc_q, BLOCK_Q, D, True, INTERPRET)
            b_k_content = load_rows(p_k_content, s_start, S, stride_kc_s, BLOCK_S, D, True, INTERPRET)
            p_mask = p_hidden
            if p_hidden is not None:
                p_mask = p_hidden + bh.to(tl.int64) * stride_hidden_bh + s_start
            b_z = transposed_visibility(p_mask, stride_hidden_q, q_start, o_key, o_row, m_s, m_q, BLOCK_Q, BLOCK_S)
            b_seen = m_s
            if p_padding is not None:
                b_seen = tl.load(p_padding + o_b * stride_padding_b + o_s, mask=m_s, other=1) == 0
            b_z = tl.where(b_seen[:, None], b_z, float("-inf"))
            b_z = tl.dot(b_k_content, b_q_content.T, b_z, input_precision="ieee")
            if p_q_pos is not None:
                b_q_pos = load_rows(p_q_pos, q_start, Q, stride_qp_q, BLOCK_Q, DP, True, INTERPRET)
                b_k_pos = load_rows(p_k_pos, s_start, S, stride_kp_s, BLOCK_S, DP, True, INTERPRET)
                b_z = tl.dot(b_k_pos, b_q_pos.T, b_z, input_precision="ieee")
            b_v = load_rows(p_v, s_start, S, stride_v_s, BLOCK_S, DV, True, INTERPRET)
            b_d_out = load_rows(p_d_out, q_start, Q, stride_do_q, BLOCK_Q, DV, True, INTERPRET)
            b_dp = tl.dot(b_v, b_d_out.T, input_precision="ieee")
            if p_rng is not None:
                b_dp = tl.where(kept(p_rng, bh, o_q[None, :], o_s[:, None], dropout_p), b_dp * keep, 0.0)
            b_own_m, b_own_l, b_own_d = add_block(b_own_m, b_own_l, b_own_d, b_z, b_dp, to_log2, 0)
        b_m = b_own_m
        b_log_l = log_of_sum(b_own_l)
        b_delta = mean_of(b_own_d, b_own_l)
    tl.store(p_rows + o_stat, b_m, mask=m_q)
    tl.store(p_rows + stats_size + o_stat, b_log_l, mask=m_q)
    tl.store(p_rows + 2 * stats_size + o_stat, b_delta, mask=m_q)


@triton.jit(do_not_specialize=UNALIGNED)
def backward_key_kernel(
    p_q_content,  # [B, Q, H, D]
    p_q_pos,  # [B, Q, H, DP] or None
    p_k_content,  # [B, S, H, D]
    p_k_pos,  # [B, S, H, DP] or None
    p_v,  # [B, S, H, DV]
    p_padding,  # [B, S] or None, nonzero = padded
    p_hidden,  # [B·H, Q, S] or None, nonzero = hidden
    p_rng,  # [2] int64 or None: seed, offset
    p_stats,  # [2, B, H, Q]: m, log2 l
    p_delta,  # [B, H, Q]
    p_d_out,  # [B, Q, H, DV]
    p_dk_content,  # [B, S, H, D] or None, written
    p_dk_pos,  # [B, S, H, DP] or None, written
    p_dv,  # [B, S, H, DV] or None, written
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
    stride_do_b,
    stride_do_q,
    stride_do_h,
    stride_padding_b,
    stride_hidden_bh,
    stride_hidden_q,
    BH,
    H,
    Q,
    S,
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
    s_blocks = tl.cdiv(S, BLOCK_S)
    bh = tl.program_id(0) // s_blocks
    o_b = (bh // H).to(tl.int64)
    o_h = (bh % H).to(tl.int64)
    s_start = (tl.program_id(0) % s_blocks) * BLOCK_S
    o_key = tl.arange(0, BLOCK_S)
    o_s = s_start + o_key
    m_s = o_s < S

    p_k_content += o_b * stride_kc_b + o_h * stride_kc_h
    b_k_content = load_rows(p_k_content, s_start, S, stride_kc_s, BLOCK_S, D, True, INTERPRET)
    p_q_content += o_b * stride_qc_b + o_h * stride_qc_h
    if p_q_pos is not None:
        p_k_pos += o_b * stride_kp_b + o_h * stride_kp_h
        b_k_pos = load_rows(p_k_pos, s_start, S, stride_kp_s, BLOCK_S, DP, True, INTERPRET)
        p_q_pos += o_b * stride_qp_b + o_h * stride_qp_h
    p_v += o_b * stride_v_b + o_h * stride_v_h
    b_v = load_rows(p_v, s_start, S, stride_v_s, BLOCK_S, DV, True, INTERPRET)
    p_d_out += o_b * stride_do_b + o_h * stride_do_h
    p_stats += bh.to(tl.int64) * Q
    p_delta += bh.to(tl.int64) * Q
    stats_size = BH.to(tl.int64) * Q

    end = Q
    if p_padding is not None:
        b_padded = tl.load(p_padding + o_b * stride_padding_b + o_s, mask=m_s, other=1) != 0
        end = tl.where(tl.min(b_padded.to(tl.int32)) == 1, 0, Q)
    if p_hidden is not None:
        p_hidden += bh.to(tl.int64) * stride_hidden_bh + s_start

    to_log2 = tl.cast(scale, tl.float32) * LOG2E
    keep = tl.cast(dropout_scale, tl.float32)
    b_dk_content = tl.zeros([BLOCK_S, tile_width(D)], tl.float32)
    b_dk_pos = tl.zeros([BLOCK_S, tile_width(DP)], tl.float32)
    b_dv = tl.zeros([BLOCK_S, tile_width(DV)], tl.float32)
    for q_start in tl.range(0, end, BLOCK_Q, num_stages=STAGES):
        o_row = tl.arange(0, BLOCK_Q)
        o_q = q_start + o_row
        m_q = o_q < Q
        b_q_content = load_rows(p_q_content, q_start, Q, stride_qc_q, BLOCK_Q, D, True, INTERPRET)
        b_z = transposed_visibility(p_hidden, stride_hidden_q, q_start, o_key, o_row, m_s, m_q, BLOCK_Q, BLOCK_S)
        b_z = tl.dot(b_k_content, b_q_content.T, b_z, input_precision="ieee")
        if p_q_pos is not None:
            b_q_pos = load_rows(p_q_pos, q_start, Q, stride_qp_q, BLOCK_Q, DP, True, INTERPRET)
            b_z = tl.dot(b_k_pos, b_q_pos.T, b_z, input_precision="ieee")
        b_m = tl.load(p_stats + o_q, mask=m_q, other=0.0)
        b_log_l = tl.load(p_stats + stats_size + o_q, mask=m_q, other=0.0)
        b_p = weights(b_z, b_m[None, :], b_log_l[None, :], to_log2)

        b_d_out = load_rows(p_d_out, q_start, Q, stride_do_q, BLOCK_Q, DV, True, INTERPRET)
        b_dp = tl.dot(b_v, b_d_out.T, input_precision="ieee")
        b_weight = b_p
        if p_rng is not None:
            m_kept = kept(p_rng, bh, o_q[None, :], o_s[:, None], dropout_p)
            b_weight = tl.where(m_kept, b_p * keep, 0.0)
            b_dp = tl.where(m_kept, b_dp * keep, 0.0)
        if p_dv is not None:
            b_dv = tl.dot(b_weight.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
        b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
        b_dz = (b_p * (b_dp - b_delta[None, :])).to(b_q_content.dtype)
        if p_dk_content is not None:
            b_dk_content = tl.dot(b_dz, b_q_content, b_dk_content, input_precision="ieee")
        if p_dk_pos is not None:
            b_dk_pos = tl.dot(b_dz, b_q_pos, b_dk_pos, input_precision="ieee")

    if p_padding is not None:
        b_dk_content = tl.where(b_padded[:, None], 0.0, b_dk_content)
        b_dk_pos = tl.where(b_padded[:, None], 0.0, b_dk_pos)
        b_dv = tl.where(b_padded[:, None], 0.0, b_dv)
    b_scale = tl.cast(scale, tl.float32)
    o_head = o_b * S * H + o_h
    if p_dk_content is not None:
        store_rows(p_dk_content + o_head * D, s_start, S, H * D, b_dk_content * b_scale, BLOCK_S, D)
    if p_dk_pos is not None:
        store_rows(p_dk_pos + o_head * DP, s_start, S, H * DP, b_dk_pos * b_scale, BLOCK_S, DP)
    if p_dv is not None:
        store_rows(p_dv + o_head * DV, s_start, S, H * DV, b_dv, BLOCK_S, DV)
