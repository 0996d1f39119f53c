"""What the parts share that are known by what they hold and what they compute: neither repository is a package."""

from __future__ import annotations

import dis
import functools
from typing import Any, ClassVar

from torch import nn

from dab_fast.adapters._fast import FastPart
from dab_fast.parameters import StepAside


class Recognised(FastPart):
    """Mixed into a subclass of a class of the user's own."""

    dab_fast_names: ClassVar[tuple[str, ...]]  # of the arguments of the original's forward, in its order
    dab_fast_unread: ClassVar[frozenset[str]]  # those that it takes and never reads

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        """A structure alone says little: what cannot be read or probed now is left as it is."""
        if any(kind.__module__.startswith("dab_fast.") for kind in type(module).__mro__):
            return f"{type(module).__qualname__} is fast already"
        try:
            if "forward" in vars(module):
                raise StepAside("its forward is patched")
            cls.dab_fast_probe(module, *cls.dab_fast_read(module))
        except StepAside as reason:
            return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
        return None

    def dab_fast_given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...]
    ) -> list[Any]:
        """The `known` arguments in their order, by the names that the original's forward has. Raises StepAside."""
        if len(args) > len(self.dab_fast_names):
            raise StepAside(f"its forward takes {len(args)} arguments by position, whose names are unknown")
        given = dict(zip(self.dab_fast_names, args, strict=False)) | kwargs
        if unknown := [name for name in given if name not in known and name not in self.dab_fast_unread]:
            raise StepAside(f"the original takes no {', '.join(unknown)}")
        for name in needed:
            if given.get(name) is None:
                raise StepAside(f"{name} is None")
        return [given.get(name) for name in known]


@functools.cache
def fast_subclass(mixin: type[Recognised], original: type[nn.Module]) -> type[Recognised]:
    names, unread = _signature(original.forward)
    body = {
        "dab_fast_original": original,
        "dab_fast_names": names,
        "dab_fast_unread": unread,
        "__doc__": f"{original.__module__}.{original.__qualname__} with the forward of dab_fast.",
    }
    return type(original.__name__, (mixin, original), body)


def _signature(forward: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of the arguments of a forward, and those that it takes and never reads."""
    code = forward.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    read = {instruction.argval for instruction in dis.get_instructions(code) if "LOAD" in instruction.opname}
    return names[: code.co_argcount - 1], frozenset(names) - read
