"""Read a module tree's parameters under canonical names, or say why reading them would be wrong.

The fast forward reads `.weight` where the original calls the module. Both are the same only for plain modules: a
LoRA adapter, a quantised Linear, a hook, a parametrization, a shard or an offloaded weight would be ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

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


def gather(root: nn.Module, containers: Callable[[nn.Module], bool], rename: Rename) -> dict[str, Tensor]:
    """The parameters of the tree below `root`, named by `rename` from their dotted module names.

    Args:
        root: the decoder; its own type and hooks are the caller's business.
        containers: says whether a module that holds parameters only in its children is one whose forward we know.
        rename: canonical name of a dotted module name; None leaves the subtree out.

    Raises:
        StepAside: a module is not of an exact known type, or is hooked, patched, offloaded or sharded.
    """
    if nn_module._has_any_global_hook():
        raise StepAside("a global module hook is registered")
    params: dict[str, Tensor] = {}
    todo = [(name, child) for name, child in root._modules.items() if child is not None]
    while todo:
        name, module = todo.pop()
        canonical = rename(name)
        if canonical is None:
            continue
        kind = type(module)
        if kind not in PARAMETERS and kind not in PARAMETERLESS and not containers(module):
            raise StepAside(f"{name} is a {kind.__module__}.{kind.__qualname__}")
        check_unhooked(name, module)
        for key in PARAMETERS.get(kind, ()):
            params[f"{canonical}.{key}"] = _plain(f"{name}.{key}", getattr(module, key))
        if kind is nn.LayerNorm and module.eps != LAYER_NORM_EPS:
            raise StepAside(f"{name} has eps {module.eps}, not {LAYER_NORM_EPS}")
        todo.extend((f"{name}.{key}", child) for key, child in module._modules.items() if child is not None)
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


def _plain(name: str, x: Tensor | None) -> Tensor:
    if x is None:
        raise StepAside(f"{name} is absent")
    if type(x) is not nn.Parameter and type(x) is not Tensor and not torch.compiler.is_compiling():
        raise StepAside(f"{name} is a {type(x).__module__}.{type(x).__qualname__}")
    if x.is_meta:
        raise StepAside(f"{name} is on the meta device")
    return x
