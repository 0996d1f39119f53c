"""What a call launches, what it keeps for backward, how long it takes.

Counting needs no GPU. It says what the call asks of PyTorch, not what a GPU executes: `aten_calls` is not a number of
kernels, since one ATen call may launch several.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MIN_ROUNDS = 3

# Calls that launch nothing, though their schemas do not say that they return a view.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_READS_ON_THE_HOST = ("cpu", "numpy", "tolist")  # methods; `__array__` calls numpy()
_SYNC_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Counts:
    """What one call did, by name."""

    aten: Counter[str] = field(default_factory=Counter)  # ATen calls that compute: views and allocations left out
    kernels: Counter[str] = field(default_factory=Counter)  # launches of this package's own kernels
    syncs: Counter[str] = field(default_factory=Counter)  # what makes the host wait for a GPU: reads of a value or size


def count(fn: Callable[[], Any], *, execute_kernels: bool = True) -> Counts:
    """Counts what fn() does, in forward and in backward.

    Args:
        execute_kernels: False counts Triton launches without executing them, so that large shapes are cheap; the
            results are then meaningless.

    A read of a tensor's value or of a shape that depends on values counts as a sync on a CPU too, where it is free.
    A call into the extension counts as one kernel.
    """
    counts = Counts()
    with _count_launches(counts, execute_kernels), _count_reads(counts), _Dispatched(counts):
        fn()
    return counts


def aten_calls(fn: Callable[[], Any]) -> int:
    """The ATen calls of fn() that compute, each at least one launch on a GPU; views and allocations left out."""
    return count(fn).aten.total()


def kernel_launches(fn: Callable[[], Any]) -> int:
    """The launches of this package's own kernels in fn(), in the interpreter too."""
    return count(fn).kernels.total()


def host_syncs(fn: Callable[[], Any]) -> int:
    """How often fn() would make the host wait for a GPU."""
    return count(fn).syncs.total()


def saved_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = (), *, execute_kernels: bool = True) -> int:
    """Bytes that fn()'s autograd graph keeps for backward: unique storages, without those of `exclude`.

    What a checkpoint's function itself holds, such as the inputs that it reads, autograd does not know.

    Args:
        execute_kernels: as in `count`.
    """
    excluded = {x.untyped_storage().data_ptr() for x in exclude}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.detach())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with torch.enable_grad(), _count_launches(Counts(), execute_kernels), hooks:
        result = fn()
    del result
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in excluded)


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most memory that fn() holds at once beyond what is held before it.

    On a GPU the allocator's peak. On a CPU the storages that PyTorch's calls return: what a call needs inside itself,
    and gives back, is not seen there.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    allocations = _Allocations()
    with allocations:
        fn()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_iter((args, kwargs)):  # results may share what was there before
            if isinstance(x, Tensor):
                self.known.add(x.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


@contextmanager
def kernels_skipped() -> Iterator[None]:
    """Triton launches do nothing in here; results are meaningless."""
    with _count_launches(Counts(), execute=False):
        yield


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per round."""

    wall: list[float]  # until the device has finished
    device: list[float] | None = None  # between two events on a GPU

    @property
    def best(self) -> list[float]:
        """The device's times where there are some, else the wall clock's."""
        return self.wall if self.device is None else self.device

    def quantile(self, q: float) -> float:
        """The time that the share `q` of the calls stays below."""
        return quantile(self.best, q)


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile in [0, 1], interpolated between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleaved_times(
    fns: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    seconds: float = math.inf,
    device: torch.device | str = "cpu",
    rest: float = 0.0,
) -> dict[str, Times]:
    """Times every fn once per round, so that a busy or throttling machine is unfair to none.

    The order moves on by one every round. On a GPU the L2 cache is overwritten before each call, and a call is timed
    by events and by the wall clock.

    Args:
        rounds: at most this many.
        warmup: untimed calls of each fn before the rounds.
        seconds: no new round starts after this long, but for the first three.
        rest: seconds to sleep before each timed call.
    """
    device = torch.device(device)
    names = list(fns)
    for name in names:
        for _ in range(warmup):
            fns[name]()
    timer = _cuda_call if device.type == "cuda" else _cpu_call
    scratch = _l2_scratch(device) if device.type == "cuda" else None
    walls: dict[str, list[float]] = {name: [] for name in names}
    devices: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if rest:
                time.sleep(rest)
            wall, on_device = timer(fns[name], scratch)
            walls[name].append(wall)
            devices[name].append(on_device)
    return {name: Times(walls[name], devices[name] if device.type == "cuda" else None) for name in names}


def _cpu_call(fn: Callable[[], Any], scratch: Tensor | None) -> tuple[float, float]:
    start = time.perf_counter()
    fn()
    seconds = time.perf_counter() - start
    return seconds, seconds


def _cuda_call(fn: Callable[[], Any], scratch: Tensor | None) -> tuple[float, float]:
    assert scratch is not None
    scratch.zero_()
    device = scratch.device  # not always the current one, whose streams and events would time nothing
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    begin.record(stream)
    fn()
    end.record(stream)
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, begin.elapsed_time(end) / 1e3


def _l2_scratch(device: torch.device) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device=device)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "dab_fast":
            if args[-1] == "native":
                self.counts.kernels[name] += 1
            with self:  # an op of ours also calls ATen
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        if name not in _ALLOCATIONS and not _returns_view(func):
            self.counts.aten[f"{func.namespace}.{name}"] += 1
        if _SYNC_TAGS.intersection(func.tags) or _crosses_devices(name, args, result, kwargs):
            self.counts.syncs[f"{func.namespace}.{name}"] += 1
        return result


@contextmanager
def _count_reads(counts: Counts) -> Iterator[None]:
    """Reads on the host that never reach the dispatcher where the tensor is on the CPU already.

    A TorchFunctionMode would see them too, but the original attention of IDEA-Research does not run under one.
    """

    def counted(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(read)
        def counting(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.device.type == "cpu":
                counts.syncs[name] += 1
            return read(self, *args, **kwargs)

        return counting

    with ExitStack() as stack:
        for name in _READS_ON_THE_HOST:
            stack.enter_context(mock.patch.object(Tensor, name, counted(name, getattr(Tensor, name))))
        yield


def _returns_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _crosses_devices(name: str, args: Any, result: Any, kwargs: Any) -> bool:
    if name not in ("_to_copy", "copy_") or kwargs.get("non_blocking"):
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type != result.device.type


@contextmanager
def _count_launches(counts: Counts, execute: bool) -> Iterator[None]:
    if "triton" not in sys.modules:
        try:  # a first call may import it while counting
            importlib.import_module("triton")
        except ImportError:
            yield
            return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if not warmup:
                counts.kernels[self.__name__] += 1
                if not execute:
                    return None
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                return original(self, *args, grid=grid, warmup=warmup, **kwargs)

        return run

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", counted(kind.run)))
        yield
