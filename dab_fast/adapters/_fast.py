"""What every fast class shares: where it came from, and how it steps aside."""

from __future__ import annotations

import logging
from collections import Counter
from typing import ClassVar, NamedTuple

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
