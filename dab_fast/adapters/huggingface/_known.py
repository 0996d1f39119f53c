"""What the fast classes of Hugging Face's DAB-DETR share: whether the code that runs here is their file's, first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.dab_detr import modeling_dab_detr as original

from dab_fast._tracing import compiling
from dab_fast.adapters._description import Code, is_from
from dab_fast.adapters._fast import Fast, FastPart
from dab_fast.config import Activation
from dab_fast.parameters import StepAside, check_unhooked

# The forwards as their file has them; None where it was patched before.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward if is_from(kind.forward, {"transformers"}) else None
    for kind in (
        original.DabDetrDecoder,
        original.DabDetrModel,
        original.DabDetrForObjectDetection,
        original.DabDetrEncoder,
        original.DabDetrConvModel,
        original.DabDetrConvEncoder,
        original.DabDetrSinePositionEmbedding,
        original.DabDetrMLP,
    )
}


def is_theirs(kind: type[nn.Module]) -> bool:
    """Whether a class of theirs has the forward that their file has."""
    return _FORWARDS[kind] is not None and kind.forward is _FORWARDS[kind]


def is_known(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of `module`, accelerated or not, computes their forward of `kind`, and nothing else."""
    return getattr(module, "dab_fast_original", type(module)) is kind and is_theirs(kind) and is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    try:
        check_unhooked("", module)
    except StepAside:
        return False
    return not nn_module._has_any_global_hook()


class Known(Fast):
    """Mixed into a fast subclass of a class of theirs, which is left alone where its file's code was patched."""

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        kind = cls.dab_fast_original
        if not is_theirs(kind):
            return f"{kind.__name__}.forward is patched"
        if issubclass(cls, FastPart) and (name := Code(module, kind).foreign(module, kind)) is not None:
            return f"{name} is patched"
        return super().dab_fast_why_not(module)


def asked(config: Any, **options: Any) -> list[Any]:
    """The options of a call in their order: one that is None is the config's."""
    return [getattr(config, name) if x is None else x for name, x in options.items()]


def activation(module: nn.Module) -> Activation:
    names: dict[type, Activation] = {
        nn.PReLU: "prelu",
        nn.ReLU: "relu",
        nn.GELU: "gelu",
        GELUActivation: "gelu",
        nn.SiLU: "silu",
        SiLUActivation: "silu",
        nn.SELU: "selu",
    }
    if type(module) not in names or getattr(module, "approximate", "none") != "none":
        raise StepAside(f"the activation {module} is unknown")
    return names[type(module)]


def is_all_valid(mask: Tensor) -> bool:
    """Whether nothing is padded, where asking is free: on the CPU, and not while tracing."""
    tracing = compiling() or torch.jit.is_tracing()
    return mask.device.type == "cpu" and not tracing and bool(mask.all())
