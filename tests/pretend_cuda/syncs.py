"""Counting what would make the host wait for the GPU, each with its stack."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests import pretend_cuda


class Sync(NamedTuple):
    kind: str  # "read", "host to device", "device to host", "synchronize"
    op: str
    stack: traceback.StackSummary

    def where(self) -> str:
        """The innermost line of a file outside torch."""
        for frame in reversed(self.stack):
            if "/torch/" not in frame.filename and "/pretend_cuda/" not in frame.filename:
                short = frame.filename.split("site-packages/")[-1].removeprefix(f"{pretend_cuda.ROOT}/")
                return f"{short}:{frame.name}"
        return "autograd's thread"


@contextmanager
def syncs() -> Iterator[list[Sync]]:
    """A list that fills with the syncs of this block."""
    found: list[Sync] = []
    device = pretend_cuda.device()
    device.watch(lambda kind, op: found.append(Sync(kind, op, traceback.extract_stack()[:-1])))
    try:
        yield found
    finally:
        device.watch(None)


def table(found: list[Sync]) -> Counter[tuple[str, str, str]]:
    return Counter((sync.kind, sync.op, sync.where()) for sync in found)
