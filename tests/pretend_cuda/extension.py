"""dab_fast's CUDA extension on the pretend device: its emulation in tests/support/cuda_on_cpu."""

from __future__ import annotations

import threading

from tests import pretend_cuda


def patch(folder, module):
    """Gives the package's calls of CUDA kernels to the emulation, compiled in `folder` on first use."""
    from tests.support import cuda_on_cpu

    device = pretend_cuda.device()
    emulation = cuda_on_cpu.Emulation(cuda_on_cpu.build(folder))
    real = module.C
    lock = threading.RLock()

    class Extension:
        HAS_CUDA = True

        def __getattr__(self, name):
            if name == "cuda_partial_rows":
                return emulation.cuda_partial_rows
            if not name.startswith("cuda_box"):
                return getattr(real, name)
            found = getattr(emulation, name)

            def launch(*args):
                where, stream = args[-2:]
                if not 0 <= where < device.device_count():
                    raise RuntimeError(
                        f"dab_fast: {name} on cuda:{where}: cudaErrorInvalidDevice: invalid device ordinal"
                    )
                if where != device.get_device() or stream != device.get_stream(where):
                    raise RuntimeError(f"{name} launched on cuda:{where}, stream {stream}, which is not current")
                device.check_launch()
                known, operands.list = operands.list, []

                def call():
                    with lock:
                        for x, writable in known:
                            emulation.allow(x, writable)
                        found(*args[:-2], 0, 0)

                if device.is_capturing():
                    device.record(call)
                call()

            return launch

    class Operands(threading.local):  # of the call that a thread prepares
        def __init__(self):
            self.list = []

    operands = Operands()

    def told(function, writable):
        def tell(x):
            if x is not None and x.is_cuda:
                operands.list.append((device.host_alias(x), writable))
            return function(x)

        return tell

    partial_sums = module.partial_sums

    def told_partial_sums(*args):
        partial = partial_sums(*args)
        if partial.is_cuda:
            operands.list.append((device.host_alias(partial), True))
        return partial

    module.C = Extension()
    module.operand, module.result_operand = told(module.operand, False), told(module.result_operand, True)
    module.partial_sums = told_partial_sums
