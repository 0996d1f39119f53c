"""The launches of the attention kernels; their mathematics stands in `_attention_forward` and `_attention_backward`."""

from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from dab_fast.backends.triton._attention_backward import (
    backward_key_kernel,
    backward_query_kernel,
    backward_rows_kernel,
)
from dab_fast.backends.triton._attention_forward import combine_kernel, forward_kernel
from dab_fast.backends.triton._cases import CompileCase
from dab_fast.backends.triton._common import INTERPRET
from dab_fast.backends.triton._launch import cdiv, on_device_of
from dab_fast.backends.triton.configs import (
    Arithmetic,
    AttentionConfig,
    AttentionKernel,
    attention_config,
    key_splits,
    num_sms,
)

COMBINE_BLOCK_Q = 8


def addressable(tensor: Tensor, rows: int = 1) -> Tensor:  # rows: which dimension they are
    """The tensor itself, or a copy where its last dimension is not dense or 64 rows span more than 32 bits.

    Blocks are found by 64-bit offsets; inside one they are 32 bits wide, which is a program per SM on sm_90.
    """
    return tensor if tensor.stride(-1) == 1 and tensor.stride(rows) < 2**25 else tensor.contiguous()


def dot_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """fp32 operands are multiplied exactly, also where the user allowed tf32 for matrix products.

    In one tf32 product each, the kernels' errors were two to three times those of PyTorch's tf32 on an H200.
    The interpreter is exact in any case, and has no registers to save by small tiles.
    """
    return "half" if dtype != torch.float32 or INTERPRET else "ieee"


def kernel_inputs(
    q_content: Tensor,  # [B, Q, H, D]
    q_pos: Tensor | None,  # [B, Q, H, DP]
    k_content: Tensor,  # [B, S, H, D]
    k_pos: Tensor | None,  # [B or 1, S, H, DP]
    v: Tensor,  # [B, S, H, DV]
    key_padding_mask: Tensor | None,  # [B, S] bool, True = padded
    attn_mask: Tensor | None,  # [Q, S] or [B·H, Q, S] bool, True = hidden
) -> tuple[list[Any], list[int], list[int]]:
    """The tensors with a dense last dimension, their (batch, row, head) strides, and the strides of the masks."""
    batch = q_content.shape[0]
    tensors: list[Any] = []
    strides: list[int] = []
    for x in (q_content, q_pos, k_content, k_pos, v):
        if x is None:
            strides += (0, 0, 0)
        else:
            x = addressable(x)
            strides += (x.stride(0) if x.shape[0] == batch else 0, x.stride(1), x.stride(2))
        tensors.append(x)
    mask_strides = [0, 0, 0]
    if key_padding_mask is not None:
        key_padding_mask = addressable(key_padding_mask)
        mask_strides[0] = key_padding_mask.stride(0)
    if attn_mask is not None:
        attn_mask = addressable(attn_mask, -2)
        mask_strides[1:] = (attn_mask.stride(0) if attn_mask.dim() == 3 else 0, attn_mask.stride(-2))
    return [*tensors, key_padding_mask, attn_mask], strides, mask_strides


def launch_options(D: int, DP: int, DV: int, arithmetic: Arithmetic, config: AttentionConfig) -> dict[str, Any]:
    """The constants that the three kernels share, and their warps."""
    return {
        "D": D,
        "DP": DP,
        "DV": DV,
        "BLOCK_Q": config.block_q,
        "BLOCK_S": config.block_s,
        "STAGES": config.num_stages,
        "INTERPRET": INTERPRET,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": True,
    }


def combine_options(DV: int, splits: int) -> dict[str, Any]:
    return {"DV": DV, "BLOCK_Q": COMBINE_BLOCK_Q, "SPLITS": splits, "num_warps": 1, "enable_fp_fusion": True}


def dropout_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def forward(
    q_content: Tensor,  # [B, Q, H, D]
    q_pos: Tensor | None,  # [B, Q, H, DP]
    k_content: Tensor,  # [B, S, H, D]
    k_pos: Tensor | None,  # [B or 1, S, H, DP]
    v: Tensor,  # [B, S, H, DV]
    key_padding_mask: Tensor | None,  # [B, S] bool, True = padded
    attn_mask: Tensor | None,  # [Q, S] or [B·H, Q, S] bool, True = hidden
    rng: Tensor | None,  # [2] int64, seed and offset of the dropout; None without dropout
    scale: float,
    dropout_p: float,
    keep: bool,
    config: AttentionConfig | None = None,  # the default picks the tiles and the number of splits
) -> list[Tensor]:
    """out [B, Q, H, DV] in the dtype of v. With `keep`, what the backward needs, in fp32: statistics of the softmax
    [2, B, H, Q], and out again where v is not fp32."""
    B, Q, H, D = q_content.shape
    S, DV = v.shape[1], v.shape[3]
    DP = 0 if q_pos is None else q_pos.shape[3]
    out = v.new_empty(B, Q, H, DV)
    stats = v.new_empty(2, B, H, Q, dtype=torch.float32) if keep else None
    wide = out.new_empty(out.shape, dtype=torch.float32) if keep and v.dtype != torch.float32 else None
    results = [x for x in (out, stats, wide) if x is not None]
    if out.numel() == 0 or S == 0:
        for x in results:
            x.fill_(float("inf") if x is stats else 0.0)
        return results

    inputs, strides, mask_strides = kernel_inputs(q_content, q_pos, k_content, k_pos, v, key_padding_mask, attn_mask)
    arithmetic = dot_arithmetic(v.dtype)
    if config is None:
        config = attention_config("forward", arithmetic, max(D, DP, DV), attn_mask is not None or dropout_p > 0)
        programs = cdiv(Q, config.block_q) * B * H
        splits = key_splits(programs, cdiv(S, config.block_s), num_sms(v.device))
    else:
        splits = config.splits
    # Whole blocks per split; rounding up may leave fewer splits with any keys than were asked for.
    split_size = cdiv(cdiv(S, config.block_s), splits) * config.block_s
    splits = cdiv(S, split_size)
    parts = (out, wide, stats)
    if splits > 1:
        part_out = out.new_empty(splits, B, Q, H, DV, dtype=torch.float32)
        parts = (part_out, None, part_out.new_empty(splits, 2, B, H, Q))

    with on_device_of(v):
        forward_kernel[(cdiv(Q, config.block_q) * B * H, splits)](
            *inputs,
            rng,
            *parts,
            *strides,
            *mask_strides,
            B * H,
            H,
            Q,
            S,
            split_size,
            scale,
            dropout_p,
            dropout_scale(dropout_p),
            **launch_options(D, DP, DV, arithmetic, config),
        )
        if splits > 1:
            combine_kernel[(cdiv(Q, COMBINE_BLOCK_Q) * B * H,)](
                parts[0], parts[2], out, wide, stats, B * H, H, Q, scale, **combine_options(DV, splits)
            )
    return results


def backward(
    d_out: Tensor,  # [B, Q, H, DV]
    q_content: Tensor,  # [B, Q, H, D]
    q_pos: Tensor | None,  # [B, Q, H, DP]
    k_content: Tensor,  # [B, S, H, D]
    k_pos: Tensor | None,  # [B or 1, S, H, DP]
    v: Tensor,  # [B, S, H, DV]
    key_padding_mask: Tensor | None,  # [B, S] bool, True = padded
    attn_mask: Tensor | None,  # [Q, S] or [B·H, Q, S] bool, True = hidden
    rng: Tensor | None,  # [2] int64, as given to the forward
    out: Tensor,  # [B, Q, H, DV] in fp32, of the forward
    stats: Tensor,  # [2, B, H, Q], of the forward
    scale: float,
    dropout_p: float,
    needs: list[bool],  # of q_content, q_pos, k_content, k_pos, v
    *,
    query_config: AttentionConfig | None = None,
    key_config: AttentionConfig | None = None,
) -> list[Tensor]:
    """The needed of the gradients of q_content, q_pos, k_content, k_pos and v, as those are shaped."""
    B, Q, H, D = q_content.shape
    S, DV = v.shape[1], v.shape[3]
    DP = 0 if q_pos is None else q_pos.shape[3]
    create = torch.zeros if out.numel() == 0 or S == 0 else torch.empty
    dq_content, dq_pos, dk_content, dk_pos, dv = gradients = [
        create(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip((q_content, q_pos, k_content, k_pos, v), needs, strict=True)
    ]
    if create is torch.zeros:
        return [x for x in gradients if x is not None]

    dk_pos_images = dk_pos
    if dk_pos is not None and dk_pos.shape[0] != B:
        dk_pos_images = dk_pos.new_empty(B, S, H, DP, dtype=torch.float32)
    d_out, out, stats = addressable(d_out), out.contiguous(), stats.contiguous()
    sharp = v.dtype == torch.float32
    # For the second kernel: m and log2 l, which in half precision are the forward's, and D.
    rows = stats.new_empty(3 if sharp else 1, B, H, Q)
    inputs, strides, mask_strides = kernel_inputs(q_content, q_pos, k_content, k_pos, v, key_padding_mask, attn_mask)
    arithmetic = dot_arithmetic(v.dtype)
    kind = arithmetic, max(D, DP, DV), attn_mask is not None or dropout_p > 0
    query_config = query_config or attention_config("query", *kind)
    rows_config = key_config or attention_config("rows", *kind)
    key_config = key_config or attention_config("key", *kind)
    shapes = (
        *strides,
        *d_out.stride()[:3],
        *mask_strides,
        B * H,
        H,
        Q,
        S,
        scale,
        dropout_p,
        dropout_scale(dropout_p),
    )
    with on_device_of(v):
        if not sharp or any(needs[:2]):  # in half precision the second kernel needs what it writes
            backward_query_kernel[(cdiv(Q, query_config.block_q) * B * H,)](
                *inputs,
                rng,
                out,
                stats,
                d_out,
                None if sharp else rows,
                dq_content,
                dq_pos,
                *shapes,
                **launch_options(D, DP, DV, arithmetic, query_config),
                SHARP=int(sharp),
            )
        if any(needs[2:]):
            if sharp:
                backward_rows_kernel[(cdiv(Q, key_config.block_q) * B * H,)](
                    *inputs,
                    rng,
                    out,
                    stats,
                    d_out,
                    rows,
                    *shapes,
                    **launch_options(D, DP, DV, arithmetic, rows_config),
                )
            backward_key_kernel[(cdiv(S, key_config.block_s) * B * H,)](
                *inputs,
                rng,
                rows if sharp else stats,
                rows[-1],
                d_out,
                dk_content,
                dk_pos_images,
                dv,
                *shapes,
                **launch_options(D, DP, DV, arithmetic, key_config),
            )
    if dk_pos is not None and dk_pos_images is not None and dk_pos_images is not dk_pos:
        dk_pos.copy_(dk_pos_images.sum(0, keepdim=True))
    return [x for x in gradients if x is not None]


def compile_cases() -> list[CompileCase]:
    """Every row of the table of configurations: with each kind of mask, as cross-attention and as self-attention."""
    kernels: dict[AttentionKernel, Any] = {
        "forward": forward_kernel,
        "query": backward_query_kernel,
        "rows": backward_rows_kernel,
        "key": backward_key_kernel,
    }
    variants: tuple[tuple[str, ...], ...] = (
        (),
        ("padding",),
        ("split",),
        ("self",),
        ("self", "hidden"),
        ("padding", "hidden", "dropout"),
    )
    cases = []
    for kernel, arithmetic, width, variant in product(kernels, get_args(Arithmetic), (16, 32, 64), variants):
        if ("split" in variant and kernel != "forward") or (width == 16 and variant):
            continue
        if kernel == "rows" and arithmetic == "half":
            continue
        crowded = "hidden" in variant or "dropout" in variant
        element = "bf16" if arithmetic == "half" else "fp32"
        pos = None if "self" in variant else element
        pointers = {
            **dict.fromkeys(("p_q_content", "p_k_content", "p_v", "p_d_out", "p_dq_content"), element),
            **dict.fromkeys(("p_dk_content", "p_dv"), element),
            **dict.fromkeys(("p_q_pos", "p_k_pos", "p_dq_pos"), pos),
            **dict.fromkeys(("p_stats", "p_rows"), "fp32"),
            "p_delta": None if kernel == "query" and arithmetic == "ieee" else "fp32",
            "p_out": "fp32" if "split" in variant or kernel in ("query", "rows") else element,
            "p_wide": "fp32" if arithmetic == "half" and "split" not in variant else None,
            "p_dk_pos": pos and "fp32",  # shared by the images
            "p_padding": "i1" if "padding" in variant else None,
            "p_hidden": "i1" if "hidden" in variant else None,
            "p_rng": "i64" if "dropout" in variant else None,
        }
        config = attention_config(kernel, arithmetic, width, crowded)
        tile = min(config.block_q, config.block_s) * width * (2 if arithmetic == "half" else 4)
        share = tile // (32 * config.num_warps)  # bytes of it for each thread to load
        cases.append(
            CompileCase(
                name=" ".join(("attention", kernel, arithmetic, str(width), *variant)),
                kernel=kernels[kernel],
                pointers=pointers,
                floats=("scale", "dropout_p", "dropout_scale"),
                options=launch_options(width, 0 if pos is None else width, width, arithmetic, config)
                | ({"SHARP": int(arithmetic == "ieee")} if kernel == "query" else {}),
                tensor_cores=arithmetic != "ieee",
                wide_loads=0.0 if share < 16 else 1.0,
                default=width == 32 and not crowded,
            )
        )
    cases += [
        CompileCase(
            name=f"attention combine {width} {splits}",
            kernel=combine_kernel,
            pointers={
                "p_part_out": "fp32",
                "p_part_stats": "fp32",
                "p_out": "bf16",
                "p_wide": "fp32",
                "p_stats": "fp32",
            },
            floats=("scale",),
            options=combine_options(width, splits),
            tensor_cores=False,
            default=width == 32 and splits == 4,
        )
        for width, splits in product((16, 32, 64), (2, 4, 8))
    ]
    return cases
