"""What the forward of an IDEA-Research model asks of its box MLP and of its inverse sigmoid, noted and not computed.

Where it takes the sigmoid of their sum, the op computes the boxes, float32 at least. Whatever else it does with a noted
tensor computes that tensor, as the original would have where it was noted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dab_fast import ops
from dab_fast.precision import autocast_off, autocast_on, compute_dtype


class Asked:
    """Stands in for a box MLP, or for a list of them, while the forward of their model runs."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mlp = self._module
        if type(mlp) is nn.ModuleList or kwargs or [type(x) for x in args] != [Tensor]:
            return mlp(*args, **kwargs)
        hidden, weight = args[0], mlp.layers[0].weight
        alike = hidden.dtype == weight.dtype or autocast_on(weight)
        if not alike or hidden.device != weight.device or hidden.shape[-1:] != weight.shape[-1:]:
            return mlp(hidden)  # which may raise
        return _Deltas(hidden, mlp)

    def __getitem__(self, index: Any) -> Asked:
        return Asked(self._module[index])

    def __iter__(self) -> Iterator[Asked]:
        return map(Asked, self._module)

    def __len__(self) -> int:
        return len(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Modes(NamedTuple):
    """What decides how an operation on a tensor is computed, and whether it can be differentiated."""

    inference: bool
    grad: bool
    autocast: bool
    dtype: torch.dtype

    @staticmethod
    def now(x: Tensor) -> _Modes:
        return _Modes(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast_on(x), compute_dtype(x))

    @contextlib.contextmanager
    def again(self, x: Tensor) -> Iterator[None]:
        if self == _Modes.now(x):
            yield
            return
        autocast = torch.autocast(x.device.type, dtype=self.dtype) if self.autocast else autocast_off(x)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


class Noted(Tensor):
    """A tensor that is computed once something is done with it, as it would have been where it was noted."""

    source: Tensor  # that it is computed from
    modes: _Modes
    version: int | None
    value: Tensor | None  # once computed

    @classmethod
    def note(cls, source: Tensor, width: int) -> Any:
        shape, modes = (*source.shape[:-1], width), _Modes.now(source)
        self: Any = Tensor._make_wrapper_subclass(
            cls, shape, dtype=source.dtype, device=source.device, requires_grad=modes.grad
        )
        if modes.grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        self.source, self.modes, self.version, self.value = source, modes, _version(source), None
        return self

    def compute(self) -> Tensor:
        raise NotImplementedError

    def tensor(self) -> Tensor:
        if self.value is None:
            self.check_unchanged()
            with self.modes.again(self.source):
                self.value = self.compute()
        return self.value

    def is_pending(self) -> bool:
        """Whether what is added to it now may be noted too."""
        return self.value is None and self.modes == _Modes.now(self.source)

    def check_unchanged(self) -> None:
        if self.version != _version(self.source):
            raise RuntimeError(
                "dab_fast computes the boxes where the model takes their sigmoid, and what they are made of was "
                "changed in place before: accelerate the model without its head"
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is not None and not kwargs:
            with torch._C.DisableTorchFunctionSubclass():
                result = rule(*args)
            if result is not NotImplemented:
                return result
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Noted, Noted.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _refuse_gradient(gradient: Tensor) -> Tensor:
    """What PyTorch does not tell of, such as the inputs of an autograd.Function, has no way back from here."""
    raise RuntimeError("the gradient of the box head ends in dab_fast: accelerate the model without its head")


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class Unsigmoided(Noted):
    """inverse_sigmoid(boxes)"""

    eps: float
    inverse_sigmoid: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(cls, boxes: Tensor, eps: float, inverse_sigmoid: Callable[[Tensor], Tensor]) -> Any:
        self = cls.note(boxes, boxes.shape[-1])
        self.eps, self.inverse_sigmoid = eps, inverse_sigmoid
        return self

    def compute(self) -> Tensor:
        return self.inverse_sigmoid(self.source)

    def at(self, index: Any) -> Any:
        if type(index) is not int or not self.is_pending() or self.dim() < 2:
            return NotImplemented
        return Unsigmoided(self.source[index], self.eps, self.inverse_sigmoid)


class _Deltas(Noted):
    """MLP(hidden), and what was added to its first columns."""

    mlp: Any
    added: Unsigmoided | None

    @staticmethod
    def __new__(cls, hidden: Tensor, mlp: Any, added: Unsigmoided | None = None) -> Any:
        self = cls.note(hidden, 4)
        self.mlp, self.added = mlp, added
        return self

    def compute(self) -> Tensor:
        deltas: Tensor = self.mlp(self.source)
        if self.added is not None:
            deltas[..., : self.added.shape[-1]] += self.added.tensor()
        return deltas

    def takes(self, added: Any, columns: int) -> bool:
        """Whether the sum with `added`, in the first columns, is one that the op computes."""
        if not isinstance(added, Unsigmoided) or not (added.is_pending() and self.is_pending()):
            return False
        shapes = zip(reversed(added.shape[:-1]), reversed(self.shape[:-1]), strict=False)
        return (
            self.added is None
            and columns == added.shape[-1]
            and columns in (2, 4)
            and added.dim() == self.dim()
            and all(mine in (1, all_) for mine, all_ in shapes)
            and added.source.device == self.source.device
        )

    def corner(self, index: Any) -> Any:
        if type(index) is not tuple or len(index) != 2 or index[0] is not Ellipsis or type(index[1]) is not slice:
            return NotImplemented
        columns = index[1].stop
        if index[1] != slice(None, columns) or columns not in (2, 4) or not self.is_pending():
            return NotImplemented
        return _Corner(self, columns)

    def boxes(self) -> Any:
        if self.added is None or not self.is_pending():
            return NotImplemented
        self.check_unchanged()
        self.added.check_unchanged()
        reference_points = self.added.source.expand(*self.shape[:-1], -1)
        weights = [x for layer in self.mlp.layers for x in (layer.weight, layer.bias)]
        return ops.refine_boxes(self.source, reference_points, *weights, eps=self.added.eps)


class _Corner(Noted):
    """The first columns of deltas, which an addition in place changes too."""

    deltas: _Deltas

    @staticmethod
    def __new__(cls, deltas: _Deltas, columns: int) -> Any:
        self = cls.note(deltas.source, columns)
        self.deltas = deltas
        return self

    def compute(self) -> Tensor:
        return self.deltas.tensor()[..., : self.shape[-1]]


def _getitem(x: Any, index: Any) -> Any:
    if isinstance(x, Unsigmoided):
        return x.at(index)
    return x.corner(index) if isinstance(x, _Deltas) else NotImplemented


def _add_in_place(x: Any, added: Any) -> Any:
    deltas = x.deltas if isinstance(x, _Corner) else x
    if not isinstance(deltas, _Deltas) or not deltas.takes(added, x.shape[-1]):
        return NotImplemented
    deltas.added = added
    return x


def _add(x: Any, y: Any) -> Any:
    x, y = (y, x) if isinstance(x, Unsigmoided) else (x, y)
    return _Deltas(x.source, x.mlp, y) if isinstance(x, _Deltas) and x.takes(y, 4) else NotImplemented


def _setitem(x: Any, index: Any, value: Any) -> Any:
    """Python's second half of `x[...] += y`."""
    if not isinstance(value, _Corner) or value.deltas is not x or type(index) is not tuple:
        return NotImplemented
    return None if index == (Ellipsis, slice(None, value.shape[-1])) else NotImplemented


def _sigmoid(x: Any) -> Any:
    return x.boxes() if isinstance(x, _Deltas) else NotImplemented


# What the original's box head does with a noted tensor. Whatever is not here computes it.
_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.__iadd__: _add_in_place,
    Tensor.add_: _add_in_place,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.add: _add,
    torch.add: _add,
    Tensor.__setitem__: _setitem,
    Tensor.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    Tensor.shape.__get__: lambda x: x.shape,  # type: ignore[attr-defined]
    Tensor.dim: lambda x: x.dim(),
}


def computed(result: Any) -> Any:
    """What a forward returned, in which nothing is only noted."""
    if any(isinstance(x, Noted) for x in tree_leaves(result)):
        return tree_map_only(Noted, Noted.tensor, result)
    return result
