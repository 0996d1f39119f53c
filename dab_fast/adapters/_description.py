"""What a decoder's forward may depend on beside its arguments and the values of its parameters, and whether it changed.

A `Description` holds the structure and the settings of a module tree: the classes, the shapes of the parameters, and
every attribute that is a number, a flag, a string or a function. A `Code` holds which functions run: the forwards of
the classes, the functions of their file that these call, and those of PyTorch. A `Watch` says at every call, in one
pass over the modules' own dictionaries, whether either may have changed since it was made.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_INTERNAL = {*vars(nn.Module()), "training"}
_SCALARS = (bool, int, float, complex, str, bytes, type(None), tuple)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_IN_PYTORCH = ("conv2d", "dropout", "interpolate", "layer_norm", "linear", "max_pool2d", "prelu", "relu", "softmax")


def _value(x: Any) -> Any:
    """What of an attribute can be compared: of an object, its class."""
    return x if _compared(x) else type(x)


class Description:
    """The structure and the settings of a module tree, in no module's `training`; equal trees have equal ones."""

    def __init__(self, root: nn.Module, ignored: Collection[str], more: dict[str, Any] | None = None) -> None:
        """`ignored`: settings that whoever runs the decoder reads anew; `more`: settings that are not attributes."""
        self.facts: dict[str, Any] = dict(more or {})
        for path, module in root.named_modules(remove_duplicate=False):
            name = path or "it"
            if path:
                self.facts[name] = type(module)
            for key, x in (module._parameters | module._buffers).items():
                self.facts[f"{name}.{key}"] = None if x is None else tuple(x.shape)
            for key, x in vars(module).items():
                if isinstance(x, Tensor):  # of a replica of DataParallel
                    self.facts[f"{name}.{key}"] = tuple(x.shape)
                elif key not in _INTERNAL and key not in ignored and not key.startswith(("_", "dab_fast")):
                    self.facts[f"{name}.{key}" if path else key] = _value(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Description) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash(tuple(self.facts))

    def changes(self, other: Description) -> str:
        """The names of what is another in `other`, the first few."""
        names = sorted(
            name
            for name in {*self.facts, *other.facts}
            if self.facts.get(name, _ABSENT) != other.facts.get(name, _ABSENT)
        )
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


_ABSENT = object()


class Code:
    """Which functions a tree's forwards are, and which they call by name."""

    def __init__(self, root: nn.Module, original: type[nn.Module]) -> None:
        self.uses: dict[tuple[int, str], tuple[Any, str, str, Any, str]] = {}  # by whose namespace and name
        self._classes: set[type] = set()
        self._package = "torch"  # of the class whose forward uses what is noted
        self._add_class(original)
        self.add(root)
        for name in _IN_PYTORCH:
            self._note(vars(F), name, f"torch.nn.functional.{name}", getattr(F, name))

    def add(self, root: nn.Module) -> None:
        """Notes the classes of the tree that are new."""
        for module in root.modules():
            if module is not root:
                self._add_class(type(module))

    def changed(self) -> str | None:
        """The name of a function, or of a class's attribute, that is another one now."""
        for holder, name, shown, x, _ in self.uses.values():
            if holder.get(name, _ABSENT) is not x:
                return shown
        return None

    def foreign(self, root: nn.Module, original: type[nn.Module], also: Collection[str] = ()) -> str | None:
        """The name of a forward, or of a function it calls, that is not from the packages of the classes here.

        A class of another package, such as an adapter's, is not looked at: no fast forward reads it.

        Args:
            also: further packages that the original takes functions from.
        """
        packages = {"torch", original.__module__.partition(".")[0], *also}
        for kind in {original, *(type(module) for module in root.modules() if module is not root)}:
            if kind.__module__.partition(".")[0] in packages:
                for name in ("forward", "__call__"):
                    if not is_from(getattr(kind, name), packages):
                        return f"{kind.__name__}.{name}"
        for _, _, shown, x, package in self.uses.values():
            if package in packages and isinstance(x, types.FunctionType) and not is_from(x, packages):
                return shown
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # whoever unpickles a decoder finds it at its first call

    def _note(self, owner: Any, name: str, shown: str, x: Any) -> None:
        """`owner`: a class, or the globals of a file."""
        holder = vars(owner) if isinstance(owner, type) else owner
        self.uses.setdefault((id(owner), name), (holder, name, shown, x, self._package))

    def _add_class(self, kind: type) -> None:
        if kind in self._classes:
            return
        self._classes.add(kind)
        self._package = kind.__module__.partition(".")[0]
        read: set[str] = set()
        for base in kind.__mro__[:-1]:
            for name in ("forward", "__call__", "_conv_forward"):  # that it has none is a fact, too
                self._note(base, name, f"{base.__name__}.{name}", vars(base).get(name, _ABSENT))
            if not base.__module__.startswith("torch."):
                read |= self._add_function(vars(base).get("forward"))
        todo = sorted(read)
        while todo:  # the attributes of the class that a forward reads, such as a method it calls
            name = todo.pop()
            for base in kind.__mro__[:-1]:
                x = vars(base).get(name, _ABSENT)
                if not base.__module__.startswith("torch.") and _constant(x):
                    self._note(base, name, f"{base.__name__}.{name}", x)
                    new = self._add_function(x) - read
                    read |= new
                    todo += new

    def _add_function(self, function: Any) -> set[str]:
        """Notes what a function calls by name in its own file; returns every name that it reads."""
        seen: set[int] = set()
        names: set[str] = set()
        todo = [function]
        while todo:
            f = todo.pop()
            if not isinstance(f, types.FunctionType) or id(f) in seen:
                continue
            seen.add(id(f))
            todo += [cell.cell_contents for cell in f.__closure__ or () if _filled(cell)]
            todo.append(getattr(f, "__wrapped__", None))
            names.update(f.__code__.co_names)
            for name in f.__code__.co_names:
                x = f.__globals__.get(name, _ABSENT)
                if _constant(x):
                    self._note(f.__globals__, name, name, x)
                    if isinstance(x, types.FunctionType) and x.__globals__ is f.__globals__:
                        todo.append(x)
        return names


def _constant(x: Any) -> bool:
    return type(x) in _SCALARS or isinstance(x, types.FunctionType)


def _compared(x: Any) -> bool:
    """Whether an attribute's value, and not only its class, is part of a description."""
    return type(x) in _SCALARS or isinstance(x, _FUNCTIONS)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def is_from(function: Any, packages: Collection[str]) -> bool:
    code = getattr(function, "__code__", None)
    module = getattr(function, "__module__", "") or ""
    if code is None:
        return True
    parts = code.co_filename.replace("\\", "/").split("/")
    return module.partition(".")[0] in packages and any(package in parts for package in packages)


class Watch:
    """A module tree as it was found: its modules' classes, hooks, children and settings, and its tensors.

    Args:
        tensors: parameters and buffers by canonical name, as `gather` gave them.
        reading: whatever was read from the tree beside these, and holds while `tensors` gives any.
    """

    def __init__(self, root: nn.Module, code: Code, tensors: dict[str, Tensor], reading: Any) -> None:
        self.reading, self._code = reading, code
        holders = [holder for m in root.modules() for holder in (m._parameters, m._buffers)]
        places = {id(x): (holder, key) for holder in holders for key, x in holder.items()}
        self._tensors = [(name, *places[id(x)], x) for name, x in tensors.items() if id(x) in places]
        self.whole = len(self._tensors) == len(tensors)  # a replica's tensors are no parameters
        self._modules = [self._entry(module) for module in root.modules()] if self.whole else []

    @staticmethod
    def _entry(module: nn.Module) -> tuple[nn.Module, type, dict[str, Any], int, Callable[[Any], Any], Any]:
        own = vars(module)
        keys = [
            key
            for key, x in own.items()
            if key in _WATCHED or (key not in _INTERNAL and not key.startswith(("_", "dab_fast")) and _compared(x))
        ]
        get = operator.itemgetter(*keys)
        found = tuple(dict(x) if key == "_modules" else _copy(x) for key, x in zip(keys, get(own), strict=True))
        return module, type(module), own, len(own), get, found

    def tensors(self) -> dict[str, Tensor] | None:
        """The tensors by their canonical names, or None where anything may have changed since."""
        if self._code.changed() is not None or nn_module._has_any_global_hook():
            return None
        for module, kind, own, size, get, found in self._modules:
            if type(module) is not kind or len(own) != size or get(own) != found:
                return None
        tensors: dict[str, Tensor] = {}
        for name, holder, key, x in self._tensors:
            if holder.get(key) is not x:
                return None
            tensors[name] = x
        return tensors


_WATCHED = (
    "training",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _copy(x: Any) -> Any:
    return type(x)(x) if isinstance(x, dict) else x
