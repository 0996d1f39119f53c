"""`torch.cuda` on the pretend device."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import time
from pathlib import Path
from types import SimpleNamespace

from tests import pretend_cuda

CAPABILITY = tuple(int(x) for x in os.environ.get("PRETEND_CUDA_CAPABILITY", "9.0").split("."))


def preload(library):
    """Registers the device with torch's libraries, which look for one while `import torch` runs."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _names_without_device_check():
    """Ops whose CUDA wrapper leaves the check of devices to TensorIterator, from torch's own list of ops."""
    text = (
        Path(importlib.util.find_spec("torchgen").origin).parent / "packaged/ATen/native/native_functions.yaml"
    ).read_text()
    names, name = [], None
    for line in text.splitlines():
        if line.startswith("- func: "):
            name = "aten::" + line[8:].split("(")[0].split(".")[0]
        elif line.startswith("  device_check: NoCheck"):
            names.append(name)
    return sorted(set(names))


def patch(torch):
    """Makes torch.cuda work, right after torch's import."""
    device = pretend_cuda.device()
    device.unchecked(_names_without_device_check())
    C, cuda = torch._C, torch.cuda

    def index_of(x=None):
        if x is None:
            return device.get_device()
        if isinstance(x, int):
            return x if x >= 0 else device.get_device()
        x = torch.device(x)
        return device.get_device() if x.index is None else x.index

    def properties(index):
        if not 0 <= index < device.device_count():
            raise AssertionError("Invalid device id")
        return SimpleNamespace(
            name="Pretend H100",
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            multi_processor_count=132,
            total_memory=80 * 2**30,
            L2_cache_size=int(os.environ.get("PRETEND_CUDA_L2", 2**20)),
            max_threads_per_multi_processor=2048,
            warp_size=32,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",
            uuid="pretend",
            pci_bus_id=0,
            pci_device_id=0,
            pci_domain_id=0,
            clock_rate=1980000,
            memory_clock_rate=2619000,
            memory_bus_width=5120,
        )

    def stream_of(index):
        return device.get_stream(index), index, int(C._autograd.DeviceType.CUDA)

    def memory_stats(index):
        current, peak, blocks = device.memory(index)
        entry = {"all": {"current": current, "peak": peak, "allocated": peak, "freed": peak - current}}
        names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes", "inactive_split_bytes")
        count = {"all": {"current": blocks, "peak": blocks, "allocated": blocks, "freed": 0}}
        stats = dict.fromkeys(names, entry)
        stats |= dict.fromkeys(("allocation", "segment", "active", "inactive_split"), count)
        return stats | {"num_alloc_retries": 0, "num_ooms": 0, "max_split_size": -1}

    def cuda_init():
        cuda.default_generators = tuple(device.default_generator(i) for i in range(device.device_count()))
        cuda._get_device_properties = properties

    for name, function in {
        "_cuda_init": cuda_init,
        "_cuda_getDeviceCount": device.device_count,
        "_cuda_getDevice": device.get_device,
        "_cuda_setDevice": device.set_device,
        "_cuda_exchangeDevice": device.exchange_device,
        "_cuda_maybeExchangeDevice": device.exchange_device,
        "_cuda_getCurrentStream": lambda index: stream_of(index_of(index)),
        "_cuda_getDefaultStream": lambda index: (0, index_of(index), int(C._autograd.DeviceType.CUDA)),
        "_cuda_getCurrentRawStream": lambda index: device.get_stream(index),
        "_cuda_setStream": lambda stream_id, device_index, device_type: device.set_stream(stream_id, device_index),
        "_cuda_synchronize": lambda: device.host_waits("synchronize", "torch.cuda.synchronize"),
        "_cuda_isInBadFork": lambda: False,
        "_cuda_sleep": lambda cycles: device.check_launch(),
        "_cuda_getArchFlags": lambda: "sm_80 sm_90",
        "_cuda_getDriverVersion": lambda: 13000,
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_emptyCache": lambda: None,
        "_host_emptyCache": lambda: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_memoryStats": memory_stats,
        "_cuda_resetPeakMemoryStats": lambda index: device.reset_peak(index),
        "_cuda_resetAccumulatedMemoryStats": lambda index: None,
        "_cuda_memorySnapshot": lambda *args: {"segments": [], "device_traces": []},
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_canDeviceAccessPeer": lambda a, b: True,
        "_cuda_set_sync_debug_mode": device.set_sync_debug_mode,
        "_cuda_get_sync_debug_mode": device.get_sync_debug_mode,
        "_cuda_isCurrentStreamCapturing": device.is_capturing,
        "_cuda_record_memory_history": lambda *args: None,
        "_cuda_clearCublasWorkspaces": lambda: None,
        "_cuda_CUDAAllocator_AllocatorState": type("AllocatorState", (), {}),
        "_set_cached_tensors_enabled": lambda enabled: None,
    }.items():
        setattr(C, name, function)

    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda index: (70 * 2**30, 80 * 2**30))

    def exchange(index: int) -> int:
        return device.exchange_device(index)

    def maybe_exchange(index: int) -> int:
        return device.exchange_device(index)

    # Dynamo wants two different functions.
    cuda._exchange_device, cuda._maybe_exchange_device = exchange, maybe_exchange
    C._cuda_exchangeDevice, C._cuda_maybeExchangeDevice = exchange, maybe_exchange
    cuda._is_in_bad_fork = lambda: False
    cuda.graphs._cuda_isCurrentStreamCapturing = device.is_capturing
    cuda._device_count_nvml = lambda: device.device_count()
    cuda._get_device_properties = properties
    cuda.default_generators = ()
    torch.backends.cuda.is_built = lambda: True
    cuda.mem_get_info = lambda index=None: (70 * 2**30, 80 * 2**30)

    class Stream(torch.Stream):  # type: ignore[name-defined]
        def __new__(cls, device=None, priority=0, **kwargs):
            if "stream_id" in kwargs:
                return super().__new__(cls, **kwargs)
            return super().__new__(cls, device=torch.device("cuda", index_of(device)), priority=priority)

        cuda_stream = property(lambda self: self.stream_id)

    class Event:
        def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
            self.timed, self.at = enable_timing, None

        def record(self, stream=None):
            self.at = time.perf_counter()

        def wait(self, stream=None):
            pass

        def query(self):
            return True

        def synchronize(self):
            device.host_waits("synchronize", "torch.cuda.Event.synchronize")

        def elapsed_time(self, end):
            if not (self.timed and end.timed):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            return 1e3 * (end.at - self.at)

    class CUDAGraph:
        """Records the ops and launches of a capture, and runs them again on the same memory."""

        def __new__(cls, keep_graph=False):
            self = super().__new__(cls)
            self._graph = None
            return self

        def capture_begin(self, pool=None, capture_error_mode="global", check_input_liveness=False):
            device.capture_begin()

        def capture_end(self):
            self._graph = device.capture_end()

        def replay(self):
            self._graph.replay()

        def reset(self):
            self._graph = None

        def pool(self):
            return (0, 1)

        def instantiate(self):
            pass

        def debug_dump(self, path):
            pass

        enable_debug_mode = instantiate

    for module in (cuda, cuda.streams):
        module.Stream, module.Event = Stream, Event
    cuda.graphs.CUDAGraph = cuda.CUDAGraph = CUDAGraph
    cuda.graphs._graph_pool_handle = lambda: (0, 1)

    storage_to = torch.storage._to

    def to(self, where, non_blocking=False):
        where = torch.device(where)
        if where.type != "cuda" or (self.device.type == "cuda" and index_of(where) == self.device.index):
            return storage_to(self, where, non_blocking)
        made = torch.empty(self.nbytes(), dtype=torch.uint8, device=where).untyped_storage()
        return made.copy_(self, non_blocking) if made.nbytes() else made

    storage_clone = torch.UntypedStorage.clone

    def clone(self):
        if self.device.type != "cuda":
            return storage_clone(self)
        return torch.empty(self.nbytes(), dtype=torch.uint8, device=self.device).untyped_storage().copy_(self)

    torch.storage._to = torch._utils._to = to
    torch.UntypedStorage.clone = clone

    # Collectives of one process, which torch compiles with CUDA alone.
    def copies(tensor, devices):
        return [
            tensor
            if tensor.is_cuda and tensor.device.index == index_of(d)
            else tensor.to(torch.device("cuda", index_of(d)))
            for d in devices
        ]

    def broadcast_coalesced(tensors, devices, buffer_size):
        each = [copies(x.detach(), devices) for x in tensors]
        return [[of_one[i] for of_one in each] for i in range(len(devices))]

    def scatter(tensor, devices, chunk_sizes, dim, streams):
        parts = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
        return [x.to(torch.device("cuda", index_of(d))) for x, d in zip(parts, devices, strict=False)]

    def gather(tensors, dim, destination):
        where = torch.device("cpu") if destination == -1 else torch.device("cuda", index_of(destination))
        return torch.cat([x.to(where) for x in tensors], dim)

    C._broadcast, C._broadcast_coalesced, C._scatter, C._gather = copies, broadcast_coalesced, scatter, gather
    cuda.comm = importlib.import_module("torch.nn.parallel.comm")
