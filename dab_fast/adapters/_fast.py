"""What every fast class shares: where it came from, how it steps aside, and how its instances leave."""

from __future__ import annotations

import copy
import copyreg
import functools
import logging
from collections import Counter
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dab_fast._tracing import compiling, exporting
from dab_fast.adapters._description import Code, Description, Watch
from dab_fast.parameters import StepAside

logger = logging.getLogger("dab_fast")

# Of a model, in the order in which they run.
PARTS = ("backbone", "encoder", "decoder", "head", "criterion")


class DropoutRates(NamedTuple):
    """The rates of a `DecoderConfig`, by its names."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


# What reading a tree raises where a module is absent or another: a reason to step aside, for the original may not mind.
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def same(what: str, values: set[Any]) -> Any:
    """The one value that all layers have. Raises StepAside."""
    if len(values) != 1:
        raise StepAside(f"the layers' {what} differ: {sorted(map(str, values))}")
    return values.pop()


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
    dab_fast_serves: ClassVar[tuple[str, ...]]  # names in `PARTS`; the others are served only with the first
    dab_fast_active = False  # whether `accelerate` made this instance
    dab_fast_parts: tuple[str, ...] = ()  # of those that it serves, the ones asked for; without any, the original's
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
            cls.forward = _while_active(cls.forward, original)

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

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        """Why `accelerate` leaves a module, of the original class or a subclass, as it is."""
        if type(module) is not cls.dab_fast_original:
            return f"{type(module).__qualname__} is a subclass, which may compute something else"
        return "its forward is patched" if "forward" in vars(module) else None

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
        if not getattr(self, "dab_fast_parts", ()):
            return original.forward(self, *args, **kwargs)
        return fast(self, *args, **kwargs)

    return forward


class FastPart(Fast):
    """A fast part of a model, which serves a call only where it was seen to compute what its original does.

    What the original's forward may depend on is described once and compared at every call. A structure or a setting
    that is new is probed: both forwards run on a copy. Functions that were patched are not.

    The three functions below take a module of the original class, accelerated or not.
    """

    dab_fast_reads: ClassVar[frozenset[str]]  # settings that every call reads anew, such as rates
    dab_fast_code: Code | None
    dab_fast_verdicts: list[tuple[Description, str | None]]  # of what was met so far: why it is not served

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], Any]:
        """The parameters and buffers, and whatever else a call needs. Raises StepAside where they cannot be read."""
        raise NotImplementedError

    @staticmethod
    def dab_fast_settings(module: Any) -> dict[str, Any]:
        """What the original's forward reads elsewhere than in attributes of its modules."""
        return {}

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: Any) -> None:
        """Raise StepAside unless both forwards agree on a copy; the rest is what `dab_fast_read` gave."""
        raise NotImplementedError

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        if reason := super().dab_fast_why_not(module):
            return reason
        try:
            found = cls.dab_fast_read(module)
        except StepAside:
            return None  # a call steps aside until what keeps it away has gone
        try:
            cls.dab_fast_probe(module, *found)
        except StepAside as reason:
            return str(reason)
        return None

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        self.dab_fast_code, self.dab_fast_verdicts = None, []
        try:
            self.dab_fast_read(self)
            self.dab_fast_verdicts.append((self._dab_fast_description(), None))  # probed before
        except StepAside:
            pass  # perhaps later, when what keeps it away has gone
        self.dab_fast_code = Code(self, self.dab_fast_original)

    def dab_fast_served(self) -> tuple[dict[str, Tensor], Any]:
        """What `dab_fast_read` gives, where nothing has changed that was not probed. Raises StepAside."""
        if compiling():
            return self.dab_fast_read(self)
        tracing = exporting()  # whose graph must not depend on what was asked before
        watch = None if tracing else _WATCHES.get(self)
        tensors = None if watch is None else watch.tensors()
        if watch is not None and tensors is not None and watch.reading[1] == self.dab_fast_settings(self):
            return tensors, watch.reading[0]
        if self.dab_fast_code is None:
            self.dab_fast_code = Code(self, self.dab_fast_original)
        if (name := self.dab_fast_code.changed()) is not None:
            raise StepAside(f"{name} was patched after accelerate")
        tensors, reading = self.dab_fast_read(self)
        reason = self._dab_fast_verdict(tensors, reading)
        if reason is not None:
            raise StepAside(reason)
        self.dab_fast_code.add(self)
        watch = Watch(self, self.dab_fast_code, tensors, (reading, self.dab_fast_settings(self)))
        if watch.whole and not tracing:
            _WATCHES[self] = watch
        return tensors, reading

    def _dab_fast_description(self) -> Description:
        return Description(self, self.dab_fast_reads, self.dab_fast_settings(self))

    def _dab_fast_verdict(self, tensors: dict[str, Tensor], reading: Any) -> str | None:
        now = self._dab_fast_description()
        for known, reason in self.dab_fast_verdicts:
            if known == now:
                return reason
        changed = self.dab_fast_verdicts[0][0].changes(now) if self.dab_fast_verdicts else ""
        if len(self.dab_fast_verdicts) >= _MOST_VERDICTS:
            return f"{changed} keeps changing"
        reason = None
        try:
            self.dab_fast_probe(self, tensors, reading)
        except StepAside as found:
            reason = f"{changed} changed, and {found}" if changed else str(found)
        self.dab_fast_verdicts.append((now, reason))
        return reason


# A probe takes as long as some calls: what counts its calls, say, is not probed at each.
_MOST_VERDICTS = 16

# Beside the modules and not in them: a copy, a replica or a pickle has modules of its own.
_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()
