"""What every fast class shares: where it came from, and how it steps aside."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dab_fast._tracing import compiling
from dab_fast.adapters._description import Code, Description, Watch
from dab_fast.adapters._probe import Forward, probe
from dab_fast.config import DecoderConfig
from dab_fast.parameters import StepAside

logger = logging.getLogger("dab_fast")


class DropoutRates(NamedTuple):
    """The rates of a `DecoderConfig`, by its names."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


class Reasons(Counter[str]):
    """Reason to number of calls. The replicas of DataParallel share it; a deepcopy and a pickle start at nothing."""

    def __reduce__(self) -> tuple[type[Reasons], tuple[()]]:
        return Reasons, ()


class Fast(nn.Module):
    """Mixed into a subclass of the original class; an accelerated instance has that subclass as its `__class__`.

    What an instance keeps for itself is an attribute whose name begins with "dab_fast".
    """

    dab_fast_original: ClassVar[type[nn.Module]]
    dab_fast_recompute = False  # keep only the layers' inputs for backward
    dab_fast_reasons: Reasons  # how often this instance took its original forward, and why

    def dab_fast_begin(self) -> None:
        """Once, when this instance has got its fast class."""
        self.dab_fast_reasons = Reasons()

    def dab_fast_end(self) -> None:
        """Back to the original class."""
        for name in [name for name in vars(self) if name.startswith("dab_fast")]:
            delattr(self, name)
        self.__class__ = self.dab_fast_original  # type: ignore[assignment]

    def dab_fast_step_aside(self, reason: StepAside) -> None:
        """Note that a call takes the original forward: one log line per reason, a count for the report."""
        if compiling():
            return
        if str(reason) not in self.dab_fast_reasons:
            logger.warning("%s takes its original forward: %s", type(self).__name__, reason)
        self.dab_fast_reasons[str(reason)] += 1


class FastDecoder(Fast):
    """A fast decoder, which serves a call only where it was seen to compute what its original does.

    What the original's forward may depend on is described once and compared at every call. A structure or a setting
    that is new is probed: both forwards run on a copy. Functions that were patched are not.
    """

    dab_fast_reads: ClassVar[frozenset[str]]  # settings that every call reads anew, such as rates
    dab_fast_code: Code | None
    dab_fast_verdicts: list[tuple[Description, str | None]]  # of what was met so far: why it is not served

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        self.dab_fast_code, self.dab_fast_verdicts = None, []
        try:
            self.dab_fast_read()
            self.dab_fast_verdicts.append((self._dab_fast_description(), None))  # probed before
        except StepAside:
            pass  # perhaps later, when what keeps it away has gone
        self.dab_fast_code = Code(self, self.dab_fast_original)

    def dab_fast_read(self) -> tuple[dict[str, Tensor], DecoderConfig]:
        """The parameters, and which decoder it is. Raises StepAside where they cannot be read."""
        raise NotImplementedError

    def dab_fast_settings(self) -> dict[str, Any]:
        """What the original's forward reads elsewhere than in attributes of its modules."""
        return {}

    def dab_fast_forwards(self) -> tuple[Forward, Forward, bool]:
        """The original forward, the fast one, and whether they take a `tgt_mask`."""
        raise NotImplementedError

    def dab_fast_served(self) -> tuple[dict[str, Tensor], DecoderConfig]:
        """What `dab_fast_read` gives, where nothing has changed that was not probed. Raises StepAside."""
        if compiling():
            return self.dab_fast_read()
        watch = _WATCHES.get(self)
        params = None if watch is None else watch.parameters()
        if watch is not None and params is not None:
            return params, watch.reading
        if self.dab_fast_code is None:
            self.dab_fast_code = Code(self, self.dab_fast_original)
        if (name := self.dab_fast_code.changed()) is not None:
            raise StepAside(f"{name} was patched after accelerate")
        params, config = self.dab_fast_read()
        reason = self._dab_fast_verdict(config)
        if reason is not None:
            raise StepAside(reason)
        self.dab_fast_code.add(self)
        watch = Watch(self, self.dab_fast_code, params, config)
        if watch.whole:
            _WATCHES[self] = watch
        return params, config

    def _dab_fast_description(self) -> Description:
        return Description(self, self.dab_fast_reads, self.dab_fast_settings())

    def _dab_fast_verdict(self, config: DecoderConfig) -> str | None:
        now = self._dab_fast_description()
        for known, reason in self.dab_fast_verdicts:
            if known == now:
                return reason
        reason = None
        try:
            original, fast, tgt_mask = self.dab_fast_forwards()
            probe(self, config, original, fast, tgt_mask=tgt_mask)
        except StepAside as found:
            changed = self.dab_fast_verdicts[0][0].changes(now) if self.dab_fast_verdicts else ""
            reason = f"{changed} changed, and {found}" if changed else str(found)
        self.dab_fast_verdicts.append((now, reason))
        return reason


# Beside the decoders and not in them: a copy, a replica or a pickle has modules of its own.
_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()
