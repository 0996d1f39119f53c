"""Read a module tree's parameters under canonical names, or say why reading them would be wrong.

The fast forward reads `.weight` where the original calls the module. Both are the same only for plain modules: a
LoRA adapter, a quantised Linear, a hook, a parametrization, a shard or an offloaded weight would be ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dab_fast._tracing import compiling

Rename = Callable[[str], str | None]

PARAMETERS: dict[type, tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.LayerNorm: ("weight", "bias"),
    nn.PReLU: ("weight",),
    nn.Embedding: ("weight",),
}
PARAMETERLESS = {nn.ModuleList, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.SELU}
LAYER_NORM_EPS = 1e-5


class StepAside(Exception):
    """The fast forward cannot serve this call; the message says why."""


def gather(
    root: nn.Module,
    containers: Callable[[nn.Module], bool],
    rename: Rename,
    known: Mapping[type, tuple[str, ...]] = PARAMETERS,
) -> dict[str, Tensor]:
    """The parameters of the tree below `root`, named by `rename` from their dotted module names.

    Args:
        root: the decoder; its own type and hooks are the caller's business.
        containers: says whether a module that holds parameters only in its children is one whose forward we know.
        rename: canonical name of a dotted module name; None, of a child of `root`, leaves it out.
        known: classes of modules that hold parameters or buffers, and the names of these.

    Raises:
        StepAside: a module is not of an exact known type, or is hooked, patched, offloaded or sharded.
    """
    if nn_module._has_any_global_hook():
        raise StepAside("a global module hook is registered")
    params: dict[str, Tensor] = {}
    todo = [(name, child) for name, child in root._modules.items() if child is not None and rename(name) is not None]
    # This runs at every call, so it reads the modules' own dictionaries.
    while todo:
        name, module = todo.pop()
        kind = type(module)
        keys = known.get(kind)
        if keys is None and kind not in PARAMETERLESS and not containers(module):
            raise StepAside(f"{name} is a {kind.__module__}.{kind.__qualname__}")
        check_unhooked(name, module)
        todo += [(f"{name}.{key}", child) for key, child in module._modules.items() if child is not None]
        if keys is None:
            continue
        canonical = rename(name)
        for key in keys:
            x = module._parameters.get(key)
            if x is None:
                x = getattr(module, key)  # a replica's or a shard's plain tensor
            if type(x) not in _PLAIN or x.is_meta:
                _refuse(f"{name}.{key}", x)
            params[f"{canonical}.{key}"] = x
        if kind is nn.LayerNorm and module.eps != LAYER_NORM_EPS:
            raise StepAside(f"{name} has eps {module.eps}, not {LAYER_NORM_EPS}")
    return params


def check_unhooked(name: str, module: nn.Module) -> None:
    """Raise StepAside where calling `module` would do more than its class's forward."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        raise StepAside(f"{name} has a hook or a patched forward")


_PLAIN = (nn.Parameter, Tensor)


def _refuse(name: str, x: Tensor | None) -> None:
    """Raise StepAside, unless x is only a tracer's stand-in for a plain tensor."""
    if x is None:
        raise StepAside(f"{name} is absent")
    if x.is_meta:
        raise StepAside(f"{name} is on the meta device")
    if not compiling():
        raise StepAside(f"{name} is a {type(x).__module__}.{type(x).__qualname__}")
