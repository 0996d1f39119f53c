"""What every fast class shares: where it came from, and how it steps aside."""

from __future__ import annotations

import logging
from collections import Counter
from typing import ClassVar

import torch
from torch import nn

from dab_fast.parameters import StepAside

logger = logging.getLogger("dab_fast")


class Fast(nn.Module):
    """Mixed into a subclass of the original class; an accelerated instance has that subclass as its `__class__`."""

    dab_fast_original: ClassVar[type[nn.Module]]
    dab_fast_recompute = False  # keep only the layers' inputs for backward

    def dab_fast_step_aside(self, reason: StepAside) -> None:
        """Note that a call takes the original forward: one log line per reason, a count for the report."""
        if torch.compiler.is_compiling():
            return
        reasons = self.dab_fast_reasons
        if str(reason) not in reasons:
            logger.warning("%s takes its original forward: %s", type(self).__name__, reason)
        reasons[str(reason)] += 1

    @property
    def dab_fast_reasons(self) -> Counter[str]:
        """How often this instance took its original forward, by reason."""
        return self.__dict__.setdefault("_dab_fast_reasons", Counter())
