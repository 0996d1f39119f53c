"""Triton's launches on the pretend device: interpreted, or specialised and compiled as by a launch on a GPU."""

from __future__ import annotations

import functools
import os
import threading
from contextlib import contextmanager
from types import SimpleNamespace

from tests import pretend_cuda
from tests.pretend_cuda.torch_cuda import CAPABILITY


def patch_interpreter(module):
    """Lets the interpreter take device tensors, on the device that is current."""
    import torch

    device = pretend_cuda.device()

    def alias(x):
        if isinstance(x, torch.Tensor) and x.is_cuda:
            return device.host_alias(x)
        return x

    class Executor(module.GridExecutor):  # type: ignore[name-defined]
        def _init_args_hst(self, args, kwargs):
            if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in (*args, *kwargs.values())):
                return super()._init_args_hst(args, kwargs)
            return [alias(x) for x in args], {name: alias(x) for name, x in kwargs.items()}

        def _restore_args_dev(self, args, args_hst, kwargs, kwargs_hst):
            if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in (*args, *kwargs.values())):
                super()._restore_args_dev(args, args_hst, kwargs, kwargs_hst)

    module.GridExecutor = Executor
    one_at_a_time = threading.RLock()
    run = module.InterpretedFunction.run

    @functools.wraps(run)
    def launch(self, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if not any(x.is_cuda for x in tensors) or warmup:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        here = device.get_device()
        for at, x in enumerate(args):
            if isinstance(x, torch.Tensor) and not x.is_cuda:
                raise ValueError(f"Pointer argument (at {at}) cannot be accessed from Triton (cpu tensor?)")
            if isinstance(x, torch.Tensor) and x.device.index != here:
                raise RuntimeError(
                    f"{self.__name__}: argument {at} is on {x.device}, the current device is cuda:{here}"
                )
        device.check_launch()

        def call():
            with one_at_a_time:  # the interpreter patches triton.language for all threads
                return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        if device.is_capturing():
            device.record(call)
        return call()

    if os.environ.get("TRITON_INTERPRET") == "1":
        module.InterpretedFunction.run = launch


def set_driver(module):
    """Without TRITON_INTERPRET a launch specialises and compiles as on a GPU, and then the interpreter runs it.

    PRETEND_CUDA_TRITON: cubin (default) compiles it all, ttgir stops early; with "-only" appended nothing is run.
    """
    import torch
    from triton.backends.compiler import GPUTarget

    device, how = pretend_cuda.device(), os.environ.get("PRETEND_CUDA_TRITON", "cubin")

    class Launcher:
        def __init__(self, src, metadata):
            self.fn = src.fn

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, exit, *args):
            if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: grid {x, y, z}")
            for at, value in enumerate(args):
                if isinstance(value, torch.Tensor) and not value.is_cuda:
                    raise ValueError(f"Pointer argument (at {at}) cannot be accessed from Triton (cpu tensor?)")
            device.check_launch()
            if how.endswith("-only"):
                return

            def call():
                with _language_as_it_was():
                    _interpreted(self.fn).run(*args, grid=(x, y, z), warmup=False)

            if device.is_capturing():
                device.record(call)
            call()

    class Utils:
        def get_device_properties(self, index):
            return {
                "max_shared_mem": 232448,
                "multiprocessor_count": 132,
                "warpSize": 32,
                "sm_clock_rate": 1980000,
                "mem_clock_rate": 2619000,
                "mem_bus_width": 5120,
                "max_num_regs": 65536,
            }

        def load_binary(self, name, kernel, shared, index):
            return object(), 1, 0, 0, 1024

        def unload_module(self, handle):
            pass

    class Driver:
        utils, launcher_cls = Utils(), Launcher
        get_current_device = staticmethod(lambda: device.get_device())
        set_current_device = staticmethod(lambda index: device.set_device(index))
        get_current_stream = staticmethod(lambda index: device.get_stream(index))
        get_device_capability = staticmethod(lambda index=0: CAPABILITY)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", device.get_device()))
        get_device_interface = staticmethod(lambda: torch.cuda)
        is_active = staticmethod(lambda: True)

    module.driver.set_active(Driver())


_interpreting = threading.RLock()


@contextmanager
def _language_as_it_was():
    """The interpreter leaves triton.language patched, which the compiler must not see."""
    from triton.runtime import interpreter

    with _interpreting:
        patch, scopes = interpreter._patch_lang, []

        def remembered(function):
            scopes.append(patch(function))
            return SimpleNamespace(restore=lambda: None)  # all of them at the end, the last first

        interpreter._patch_lang = remembered
        try:
            yield
        finally:
            interpreter._patch_lang = patch
            for scope in reversed(scopes):
                scope.restore()


def _interpreted(function):
    """The interpreter's form of a compiled function, and of those that it calls."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    JITFunction.__call__ = lambda self, *args, **kwargs: _interpreted(self)(*args, **kwargs)
    if not hasattr(function, "_interpreted"):
        function._interpreted = InterpretedFunction(function.fn)
    return function._interpreted


def shorten_pipeline(module):
    """Ends a compilation after TTGIR, where PRETEND_CUDA_TRITON says so."""
    if not os.environ.get("PRETEND_CUDA_TRITON", "cubin").startswith("ttgir"):
        return
    add_stages = module.CUDABackend.add_stages

    def shortened(self, stages, options, language):
        add_stages(self, stages, options, language)

        def nothing(src, metadata):
            metadata.update(
                name="pretend",
                shared=0,
                tmem_size=0,
                global_scratch_size=0,
                global_scratch_align=1,
                profile_scratch_size=0,
                profile_scratch_align=1,
            )
            return ""

        stages["llir"] = stages["ptx"] = nothing
        stages["cubin"] = lambda src, metadata: b""

    module.CUDABackend.add_stages = shortened
