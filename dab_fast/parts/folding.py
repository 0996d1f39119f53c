"""Tensors derived from a module's parameters and buffers, which are never stale.

What is derived is kept beside the modules and not in them, so that no copy, pickle or state_dict has it. It is used
again only while every source is the same tensor, at the same address and version, with the same bits. The bits are
compared because a write through `.data` moves no version, and a tensor of inference mode has none. On a GPU, where
their comparison would wait, its answer is read at the next call; a change that only the bits show is seen there one
call late, derived again, and warned of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger("dab_fast")

T = TypeVar("T")

# Words of eight bytes are added up in columns. The number is prime, so that what moves within a tensor (a row of a
# matrix, a channel) comes into another column, and wraps: a sum of integers that one changed bit always changes.
_COLUMNS = 509
_LEAST = 4096  # words from which a tensor is added up; the bits of a smaller one are kept

# A GPU adds up a copy of many tensors at once, of so many words at most: calls cost it more than memory traffic.
# 0: every tensor is added up by itself, where it is.
WORDS_AT_ONCE = {"cpu": 0, "gpu": 1 << 22}

_DERIVED: WeakKeyDictionary[nn.Module, _Derived] = WeakKeyDictionary()
_warned = False


def derived(owner: nn.Module, kind: object, sources: Sequence[Tensor], build: Callable[[], T]) -> T:
    """What build() gives for these sources, computed anew only where they changed. One kind is kept per owner.

    Args:
        owner: the module that it is kept for.
        kind: what is derived, and with which settings; compared with ==.
        sources: plain tensors; build() reads nothing else that may change.
        build: runs without gradients and outside inference mode.
    """
    known = _DERIVED.get(owner)
    if known is None or not known.holds(kind, sources):
        known = _Derived(kind, sources)  # before they are read: a write meanwhile shows at the next call
        with torch.inference_mode(False), torch.no_grad():
            known.value = build()
        _DERIVED[owner] = known
    return known.value


def forget(module: nn.Module) -> None:
    """Drop what is kept for a module."""
    _DERIVED.pop(module, None)


def kept(module: nn.Module) -> Any:
    """What is kept for a module, or None."""
    known = _DERIVED.get(module)
    return None if known is None else known.value


class _Derived:
    value: Any

    def __init__(self, kind: object, sources: Sequence[Tensor]) -> None:
        self._kind, self._sources = kind, tuple(sources)
        self._places = _places(sources)
        with torch.inference_mode(False), torch.no_grad():
            self._bits = _Bits(sources)
            self._digest = self._bits.digest()
        self._answer: Callable[[], bool | None] | None = None  # to whether the bits were the same at the last call

    def holds(self, kind: object, sources: Sequence[Tensor]) -> bool:
        if (
            kind != self._kind
            or len(sources) != len(self._sources)
            or any(x is not known for x, known in zip(sources, self._sources, strict=True))
            or _places(sources) != self._places
        ):
            return False
        with torch.no_grad():
            return self._has_same_bits()

    def _has_same_bits(self) -> bool:
        device = self._digest[0].device
        if _waits_for(device):
            return all(map(torch.equal, self._bits.digest(), self._digest))
        if _is_capturing(device):  # what is captured is replayed with the memory of today
            return True
        answer = True if self._answer is None else self._answer()
        if answer is False:
            _warn()
            return False
        if answer is True:
            same = torch.stack([(a == b).all() for a, b in zip(self._bits.digest(), self._digest, strict=True)]).all()
            self._answer = _later(same)
        return True


def _places(sources: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in sources]


class _Bits:
    """The memory of some tensors as integers."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._summed: list[list[Tensor]] = []  # flat, in words: what is added up at once
        self._kept: list[Tensor] = []  # flat, in bytes
        at_once = WORDS_AT_ONCE["cpu" if sources[0].device.type == "cpu" else "gpu"]
        length = at_once
        for words in (_words(x.detach()) for x in sources):
            if words.dtype is torch.uint8 or words.numel() < _LEAST:
                self._kept.append(words.view(torch.uint8))
            elif length + words.numel() > at_once:
                self._summed.append([words])
                length = words.numel()
            else:
                self._summed[-1].append(words)
                length += words.numel()

    def digest(self) -> tuple[Tensor, ...]:
        """What changes with the bits."""
        sums, kept = [], list(self._kept)
        for words in self._summed:
            joined = words[0] if len(words) == 1 else torch.cat(words)
            whole = joined.numel() // _COLUMNS * _COLUMNS
            sums.append(joined[:whole].view(-1, _COLUMNS).sum(0))
            kept.append(joined[whole:].view(torch.uint8))
        return (torch.cat(kept), torch.cat(sums)) if sums else (torch.cat(kept),)


def _words(x: Tensor) -> Tensor:
    """The memory from a tensor's first element to its last as a flat view, in words of eight bytes where aligned."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.as_strided((length,), (1,))
    aligned = length * x.element_size() % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0
    return flat.view(torch.int64 if aligned else torch.uint8)


def _waits_for(device: torch.device) -> bool:
    """Whether a comparison's answer is read at once: what a CPU computed is there already."""
    return device.type != "cuda"


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _later(flag: Tensor) -> Callable[[], bool | None]:
    """The value of a GPU's flag once it has come, until then None; asking does not wait."""
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flag.device))
    return lambda: bool(host) if event.query() else None


def _warn() -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "parameters were written through .data, which moves no version: what was derived from them was used once "
            "more before it was derived again. Call dab_fast.refresh(model) after such a write"
        )
