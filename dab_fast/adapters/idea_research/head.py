"""The box head of IDEA-Research's models on the fused op: sigmoid(MLP(hidden) + inverse_sigmoid(reference)).

The head has no module of its own: each fork writes it into its model's forward. So that forward still runs, and what it
asks of `bbox_embed` and of `inverse_sigmoid` is noted: `_noted.py` says what becomes of that.
"""

from __future__ import annotations

import dis
import functools
import math
import types
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dab_fast import reference
from dab_fast._tracing import apart, compiling, exporting, transformed
from dab_fast.adapters._description import Code
from dab_fast.adapters._fast import Fast
from dab_fast.adapters._probe import neutral
from dab_fast.adapters.idea_research._noted import Asked, Unsigmoided, computed
from dab_fast.adapters.idea_research.models import computes_relu_mlp, is_relu_mlp
from dab_fast.parameters import StepAside, gather

_BOX_MLP, _INVERSE_SIGMOID = "bbox_embed", "inverse_sigmoid"


def looks_like_model(module: nn.Module) -> bool:
    """Whether a model's forward has the box head written into it."""
    forward = type(module).forward
    return (
        all(module._modules.get(name) is not None for name in (_BOX_MLP, "class_embed"))
        and isinstance(forward, types.FunctionType)
        and {_BOX_MLP, _INVERSE_SIGMOID} <= set(forward.__code__.co_names)
        and isinstance(forward.__globals__.get(_INVERSE_SIGMOID), types.FunctionType)
    )


class FastBoxHead(Fast):
    """Mixed into a subclass of the user's own model."""

    dab_fast_serves = ("head",)
    dab_fast_code: Code

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        try:
            if "forward" in vars(module):
                raise StepAside("its forward is patched")
            for mlp in _check_box_mlps(module):
                if not computes_relu_mlp(mlp):
                    raise StepAside(f"{_BOX_MLP} is a {type(mlp).__qualname__}, which is no relu MLP")
            _with_noted_inverse_sigmoid(type(module).forward)
        except StepAside as reason:
            return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
        return None

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        box_mlps: Any = self._modules[_BOX_MLP]
        self.dab_fast_code = Code(box_mlps, type(box_mlps))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results."""
        if compiling() or exporting() or transformed():
            return super().forward(*args, **kwargs)
        try:
            if (name := self.dab_fast_code.changed()) is not None:
                raise StepAside(f"{name} was patched after accelerate")
            _check_box_mlps(self)
            forward = _with_noted_inverse_sigmoid(self.dab_fast_original.forward)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(*args, **kwargs)
        token = _CALLED.set(self)
        try:
            return computed(forward(self, *args, **kwargs))
        finally:
            _CALLED.reset(token)

    @property
    def bbox_embed(self) -> Any:
        box_mlps = self._modules[_BOX_MLP]
        return box_mlps if compiling() or _CALLED.get() is not self else Asked(box_mlps)


# The model whose forward runs: only that one is asked, not the decoder that shares its box MLP.
_CALLED: ContextVar[nn.Module | None] = ContextVar("dab_fast_called", default=None)


@functools.cache
def fast_subclass(original: type[nn.Module]) -> type[FastBoxHead]:
    body = {
        "dab_fast_original": original,
        "__doc__": f"{original.__module__}.{original.__qualname__} with the box head of dab_fast.",
    }
    return type(original.__name__, (FastBoxHead, original), body)


def _check_box_mlps(model: nn.Module) -> list[Any]:
    """The model's box MLPs. Raises StepAside unless each is one that the op computes."""

    def rename(name: str) -> str | None:
        return name if name.partition(".")[0] == _BOX_MLP else None

    params = gather(model, is_relu_mlp, rename)
    box_mlps: Any = model._modules[_BOX_MLP]
    mlps: Any = list(box_mlps) if type(box_mlps) is nn.ModuleList else [box_mlps]
    for mlp in mlps:
        shapes = [tuple(layer.weight.shape) for layer in mlp.layers]
        d = shapes[0][-1]
        if shapes != [(d, d), (d, d), (4, d)]:
            raise StepAside(f"{_BOX_MLP} is not three linear layers of one width with four outputs, but {shapes}")
    if len({(x.dtype, x.device) for x in params.values()}) > 1:
        raise StepAside(f"the parameters of {_BOX_MLP} have several dtypes or devices")
    return mlps


def _with_noted_inverse_sigmoid(forward: Any) -> Any:
    """A model's forward, in which `inverse_sigmoid(x)` is noted. Raises StepAside where that is another formula."""
    theirs = forward.__globals__.get(_INVERSE_SIGMOID) if isinstance(forward, types.FunctionType) else None
    if not isinstance(theirs, types.FunctionType):
        raise StepAside(f"its forward was replaced by one without {_INVERSE_SIGMOID}")
    if any(instruction.opname == "STORE_GLOBAL" for instruction in dis.get_instructions(forward)):
        raise StepAside("its forward writes global variables")
    eps = _eps(theirs)

    @functools.wraps(theirs)
    def noted(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or type(x) not in _PLAIN:
            return theirs(x, *args, **kwargs)
        return Unsigmoided(x, eps, theirs)

    names = forward.__globals__ | {_INVERSE_SIGMOID: noted}
    result = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    result.__kwdefaults__ = forward.__kwdefaults__
    return result


_PLAIN = (Tensor, nn.Parameter)


def _eps(inverse_sigmoid: Any) -> float:
    """The eps of an inverse sigmoid, found out once. Raises StepAside unless it is `reference.inverse_sigmoid`."""
    if inverse_sigmoid not in _EPS:
        _EPS[inverse_sigmoid] = apart(lambda: _found_eps(inverse_sigmoid))
    if not (eps := _EPS[inverse_sigmoid]):
        raise StepAside(f"its {_INVERSE_SIGMOID} is not log(max(x, eps) / max(1 - x, eps))")
    return eps


_EPS: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # 0 for another formula


def _found_eps(inverse_sigmoid: Any) -> float:
    with neutral():
        x = torch.cat((torch.linspace(-0.1, 1.1, 49), torch.logspace(-7, -1, 49), 1 - torch.logspace(-7, -1, 49)))
        x = x.double().requires_grad_()
        try:
            found = inverse_sigmoid(x)
            eps = float(f"{math.exp(inverse_sigmoid(torch.zeros((), dtype=torch.float64))):.9g}")
            right = reference.inverse_sigmoid(x, eps)
            slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, right)]
        except Exception:
            return 0.0
        same = torch.allclose(found, right, rtol=1e-9) and torch.allclose(slopes[0], slopes[1], rtol=1e-9)
        return eps if same and 0.0 < eps < 0.5 else 0.0
