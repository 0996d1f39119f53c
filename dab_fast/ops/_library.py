"""How a fused operation becomes `torch.ops.dab_fast.<op>`; imports torch alone.

An op has one schema per direction, `<op>` and `<op>_backward`, read from the annotations of its fake, the function that
allocates what the kernels will fill. The last argument names the backend, whose module is imported at the first call.
Autograd is a `torch.autograd.Function` around the op, with `ctx` as the first argument of `forward`: a `setup_context`
costs 22 µs more per call (it binds the arguments through `inspect.signature`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dab_fast.ops import _backends

_LIBRARY = torch.library.Library("dab_fast", "DEF")


def define(name: str, fake: Callable[..., Any]) -> Any:
    """Registers an op for every device and returns the callable that dispatches to it."""

    def run(*args: Any) -> Any:
        return _backends.implementation(args[-1], name)(*args[:-1])

    schema = torch.library.infer_schema(fake, mutates_args=(), op_name=name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dab_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.dab_fast, name).default
