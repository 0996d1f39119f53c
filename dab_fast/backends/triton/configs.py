"""How the attention kernels are launched: tiles, warps and pipeline stages by arithmetic and head width.

Nothing is tuned during a user's step. The rows come from offline compilation (`python -m benchmarks.kernel_budget`):
no loop spills registers on sm_80 and sm_90 under the oldest triton and the newest, nor on sm_100 under the newest; on
sm_90 the decoder's own heads in half precision leave room for three to six programs per SM. Left alone, ptxas sometimes
parks values of a loop in local memory to fit one more program on an SM; `max_registers` forbids it where it did.
Half-precision tiles have 64 rows where they can, the height of a Hopper tensor-core instruction. Exact fp32 dots run on
the ordinary multipliers and hold whole rows of both operands in registers, hence the small tiles.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

H100_SMS = 132
WIDEST_HEAD = 64

Arithmetic = Literal["half", "ieee"]  # of the dots; the last on fp32 operands
AttentionKernel = Literal[
    "forward", "query", "rows", "key"
]  # the backward over query blocks, its sums, over key blocks


@dataclass(frozen=True)
class AttentionConfig:
    block_q: int
    block_s: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None leaves the choice to ptxas
    splits: int = 1


_ATTENTION: dict[tuple[Arithmetic, AttentionKernel, int], AttentionConfig] = {
    ("half", "forward", 32): AttentionConfig(64, 64, 4, 3),
    ("half", "forward", 64): AttentionConfig(64, 32, 4, 3),
    ("half", "query", 32): AttentionConfig(64, 64, 4, 2),
    ("half", "query", 64): AttentionConfig(64, 32, 4, 2),
    ("half", "rows", 32): AttentionConfig(32, 64, 4, 2),
    ("half", "rows", 64): AttentionConfig(32, 64, 4, 2),
    ("half", "key", 32): AttentionConfig(32, 64, 4, 2),
    ("half", "key", 64): AttentionConfig(32, 64, 4, 2),
    ("ieee", "forward", 32): AttentionConfig(32, 32, 4, 2),
    ("ieee", "forward", 64): AttentionConfig(32, 32, 8, 2),
    ("ieee", "query", 32): AttentionConfig(32, 32, 4, 2),
    ("ieee", "query", 64): AttentionConfig(32, 32, 8, 2),
    ("ieee", "rows", 32): AttentionConfig(32, 32, 8, 2),
    ("ieee", "rows", 64): AttentionConfig(16, 32, 8, 2),
    ("ieee", "key", 32): AttentionConfig(32, 32, 4, 2, 128),
    ("ieee", "key", 64): AttentionConfig(32, 32, 8, 2, 128),
}
# An attention mask and the random numbers of dropout need registers, too; without a row here, the one above has them.
_CROWDED: dict[tuple[Arithmetic, AttentionKernel, int], AttentionConfig] = {
    ("half", "forward", 32): AttentionConfig(64, 32, 4, 2, 168),
    ("half", "forward", 64): AttentionConfig(64, 32, 4, 2, 255),
    ("half", "query", 32): AttentionConfig(64, 32, 4, 2),
    ("half", "query", 64): AttentionConfig(64, 32, 8, 2),
    ("half", "key", 64): AttentionConfig(32, 32, 4, 2),
    ("ieee", "forward", 32): AttentionConfig(32, 32, 8, 2),
    ("ieee", "query", 32): AttentionConfig(32, 32, 8, 2),
    ("ieee", "key", 32): AttentionConfig(32, 32, 4, 2, 168),
    ("ieee", "key", 64): AttentionConfig(32, 32, 8, 2, 255),
}


def attention_config(
    kernel: AttentionKernel,
    arithmetic: Arithmetic,
    width: int,  # the widest head
    crowded: bool,  # with an attention mask or dropout
) -> AttentionConfig:
    """The launch of an attention kernel, keys not split."""
    if width > WIDEST_HEAD:
        raise ValueError(f"heads must be at most {WIDEST_HEAD} wide, got {width}")
    key = arithmetic, kernel, 32 if width <= 32 else 64
    return (crowded and _CROWDED.get(key)) or _ATTENTION[key]


def key_splits(
    programs: int,  # without splitting
    key_blocks: int,
    num_sms: int,
) -> int:
    """How many programs share the keys of one query block.

    Up to two programs per SM, as long as each keeps four blocks of keys: with fewer the pipeline never fills and the
    combine kernel costs more than it saves. The combine kernel has registers for eight.
    """
    return max(1, min(2 * num_sms // programs, key_blocks // 4, 8))


@functools.cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return H100_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
