"""What every fast class shares: where it came from, how it steps aside, and how its instances leave."""

from __future__ import annotations

import copy
import copyreg
import functools
import logging
from collections import Counter
from typing import Any, ClassVar, NamedTuple

from torch import nn

from dab_fast._tracing import compiling
from dab_fast.parameters import StepAside

logger = logging.getLogger("dab_fast")


class DropoutRates(NamedTuple):
    """The rates of a `DecoderConfig`, by its names."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


class Reasons(Counter[str]):
    """Reason to number of calls. The replicas of DataParallel share it; a deepcopy starts at nothing."""

    def __reduce__(self) -> tuple[type[Reasons], tuple[()]]:
        return Reasons, ()


class Fast(nn.Module):
    """Mixed into a subclass of the original class; an accelerated instance has that subclass as its `__class__`.

    What an instance keeps for itself is an attribute whose name begins with "dab_fast". The subclass bears its
    original's name and module, since other tools write both into files: saved configs, adapters, pickles.
    """

    dab_fast_original: ClassVar[type[nn.Module]]
    dab_fast_active = False  # whether `accelerate` made this instance
    dab_fast_recompute = False  # keep only the layers' inputs for backward
    dab_fast_reasons: Reasons  # how often this instance took its original forward, and why

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dab_fast_original" in vars(cls):  # not what another library derives from a fast class
            original = cls.dab_fast_original
            cls.__name__, cls.__qualname__, cls.__module__ = (
                original.__name__,
                original.__qualname__,
                original.__module__,
            )
            cls.forward = _while_active(cls.forward, original)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """What is built through an accelerated instance's class is the original's; `accelerate` takes it as any."""
        if "dab_fast_original" in vars(type(self)):
            self.__class__ = self.dab_fast_original  # type: ignore[assignment]
            self.__init__(*args, **kwargs)  # type: ignore[misc]
        else:
            super().__init__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is accelerated as this instance is."""
        theirs = getattr(super(), "__deepcopy__", None)
        return self._twin(lambda state: copy.deepcopy(state, memo), memo) if theirs is None else theirs(memo)

    def __copy__(self) -> Any:
        theirs = getattr(super(), "__copy__", None)
        return self._twin(lambda state: state, {}) if theirs is None else theirs()

    def _twin(self, copied: Any, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin  # before the state, which may refer to this instance
        # Not this class's own, with which torch's parametrizations refuse pickling; Python 3.10's object has none.
        twin.__setstate__(copied(getattr(self.dab_fast_original, "__getstate__", vars)(self)))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds an instance of the original class, and loads without this package."""
        reduced = super().__reduce_ex__(protocol)
        if type(self).__reduce_ex__ is not Fast.__reduce_ex__ or "dab_fast_original" not in vars(type(self)):
            return reduced
        logger.warning("%s is pickled as the original: what loads it must call accelerate again", type(self).__name__)
        make, args, state, *rest = (*reduced, None)[: max(3, len(reduced))]
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle would ask for this instance's class
            make, args = copyreg._reconstructor, (type(self), object, None)  # type: ignore[attr-defined]
        args = tuple(self.dab_fast_original if x is type(self) else x for x in args)
        if isinstance(state, dict):
            state = {name: x for name, x in state.items() if not _is_ours(name)}
        return make, args, state, *rest

    def dab_fast_begin(self) -> None:
        """Once, when this instance has got its fast class."""
        self.dab_fast_reasons = Reasons()
        self.dab_fast_active = True

    def dab_fast_end(self) -> None:
        """Back to the original class."""
        for name in [name for name in vars(self) if _is_ours(name)]:
            delattr(self, name)
        self.__class__ = self.dab_fast_original  # type: ignore[assignment]

    def dab_fast_step_aside(self, reason: StepAside) -> None:
        """Note that a call takes the original forward: one log line per reason, a count for the report."""
        if compiling():
            return
        if str(reason) not in self.dab_fast_reasons:
            logger.warning("%s takes its original forward: %s", type(self).__name__, reason)
        self.dab_fast_reasons[str(reason)] += 1


def _is_ours(name: str) -> bool:
    return name.startswith("dab_fast")


def _while_active(fast: Any, original: type[nn.Module]) -> Any:
    """A fast forward that is the original's on any other instance: a wrapper may hold it beyond `restore`."""

    @functools.wraps(fast)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "dab_fast_active", False):
            return original.forward(self, *args, **kwargs)
        return fast(self, *args, **kwargs)

    return forward
