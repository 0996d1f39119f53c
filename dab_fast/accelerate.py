"""accelerate() and restore(): give a model's own modules the fast forward, and take it back."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dab_fast._tracing import apart
from dab_fast.adapters import ADAPTERS
from dab_fast.adapters._fast import PARTS, Fast, Reasons
from dab_fast.parts.folding import forget, kept


@dataclass(frozen=True, repr=False)
class Report:
    """What `accelerate` did to a model. Printing it shows the calls that stepped aside so far, too."""

    replaced: dict[str, Fast]  # by name in the model; "" is the model itself
    not_replaced: dict[str, str]  # name to reason
    parts: dict[str, tuple[str, ...]]  # name to the parts of the model that the module serves
    reasons: dict[str, Reasons]  # by name, the modules' own; they outlive `restore`

    @property
    def stepped_aside(self) -> dict[str, dict[str, int]]:
        """Calls that took the original forward since `accelerate`: name to reason to count."""
        return {name: dict(reasons) for name, reasons in self.reasons.items() if reasons}

    def __str__(self) -> str:
        lines = [f"dab_fast: {len(self.replaced)} modules accelerated"]
        for name, module in self.replaced.items():
            parts = " and ".join(self.parts[name])
            folded = getattr(kept(module), "nbytes", None)
            memory = f", which keeps {folded() / 1e6:.0f} MB of folded weights" if folded else ""
            lines.append(f"  {name or '(model)'}: {type(module).__name__}, {parts}{memory}")
        lines += [f"  {name or '(model)'} left as it is: {reason}" for name, reason in self.not_replaced.items()]
        for name, reasons in self.stepped_aside.items():
            lines += [f"  {name or '(model)'} stepped aside {n} times: {reason}" for reason, n in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: nn.Module, *, parts: Collection[str] = PARTS, recompute: bool = False) -> Report:
    """Make the DAB-DETR model that `model` is or holds fast, in place; `restore` undoes it.

    Each known module becomes an instance of a subclass with the fast forward: parameters, state_dict keys, other
    instances and the libraries' classes stay as they are. A call that the fast forward cannot serve takes the
    original one. Boxes are float32 at least whatever the dtype of the content; dab_fast's own kernels give the same
    bits from run to run. A deepcopy is accelerated too; a pickle (`torch.save` of the model, a spawned worker's copy)
    holds the original classes and loads without dab_fast, and what `type(model)(…)` builds is the original's: call
    `accelerate` on those.

    A second derivative (`create_graph=True`, gradient penalties) raises: `restore` the model before one. Forward mode
    and `torch.func` run in plain PyTorch.

    Args:
        model: a Hugging Face `DabDetrForObjectDetection`, `DabDetrModel` or `DabDetrDecoder`; of
            IDEA-Research/DAB-DETR or DN-DETR a model whose forward has their box head, a `TransformerEncoder` or
            `TransformerDecoder`, a `SetCriterion`, a ResNet in torchvision's `IntermediateLayerGetter`; or any module
            with one inside. What torch.compile returned is one, and compiles anew at its next call; what torch.jit or
            torch.export made of a module is none.
        parts: which parts of the model, of "backbone", "encoder", "decoder", "head" and "criterion". Hugging Face's
            head calls its criterion, which is fast only where the head is. When a model is accelerated again, the last
            call's `parts` and `recompute` hold.
        recompute: in training keep only the decoder layers' inputs for backward, and compute the layers again there:
            less memory for more time. A Hugging Face decoder whose layers have `gradient_checkpointing` set is
            recomputed without it (transformers 5.23 itself refuses `gradient_checkpointing_enable()` for DAB-DETR).

    Returns:
        A `Report`: the modules replaced, those that look like DAB-DETR and were not, with the reason, and, whenever
        it is printed, the calls that took the original forward since.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in `model` is a part that dab_fast knows, or `parts` names an unknown one; the model is
            left as it was.
    """
    _check_module(model)
    wanted = _checked_parts(parts)
    replaced, not_replaced = apart(lambda: _replace(model, wanted))
    for module in replaced.values():
        module.dab_fast_recompute = recompute
    if not replaced:
        found = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in not_replaced.items())
        raise ValueError(
            f"model must contain a part of DAB-DETR that dab_fast knows ({', '.join(ADAPTERS)}), got "
            f"{type(model).__module__}.{type(model).__qualname__}{' (' + found + ')' if found else ''}"
            f"{_advice(model)}"
        )
    parts_of = {name: module.dab_fast_parts for name, module in replaced.items()}
    return Report(replaced, not_replaced, parts_of, {name: x.dab_fast_reasons for name, x in replaced.items()})


def _checked_parts(parts: Collection[str]) -> tuple[str, ...]:
    if isinstance(parts, str) or not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts must be some of {PARTS}, got {parts!r}")
    return tuple(part for part in PARTS if part in parts)


def _replace(model: nn.Module, parts: tuple[str, ...]) -> tuple[dict[str, Fast], dict[str, str]]:
    """The first two fields of the `Report`."""
    adapters = [importlib.import_module(f"dab_fast.adapters.{name}") for name in ADAPTERS]
    replaced: dict[str, Fast] = {}
    not_replaced: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _TRANSLATED):
            continue
        if not _is_accelerated(module):
            fast_class = next(filter(None, (adapter.fast_class(module) for adapter in adapters)), None)
            if fast_class is None or fast_class.dab_fast_serves[0] not in parts:
                continue
            if reason := fast_class.dab_fast_why_not(module):
                not_replaced[name] = reason
                continue
            module.__class__ = fast_class
            module.dab_fast_begin()
        assert isinstance(module, Fast)
        serves = module.dab_fast_serves
        module.dab_fast_parts = tuple(part for part in serves if part in parts and serves[0] in parts)
        if module.dab_fast_parts:
            replaced[name] = module
    return replaced, not_replaced


def _is_accelerated(module: nn.Module) -> bool:
    return isinstance(module, Fast) and module.dab_fast_active


# What torch.jit and torch.fx, and so torch.export, make of modules: their forward is no longer the class's.
_TRANSLATED = (torch.jit.ScriptModule, torch.fx.GraphModule)


def _advice(model: nn.Module) -> str:
    if any(isinstance(module, _TRANSLATED) for module in model.modules()):
        return ": accelerate the original module, before torch.jit, torch.fx or torch.export translates it"
    return ""


def _check_module(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        got = f"the class {model.__qualname__}: give an instance of it"
    elif isinstance(model, torch.export.ExportedProgram):
        got = "an ExportedProgram: give the original module, before torch.export translates it"
    elif callable(model):
        got = f"a {type(model).__name__}: give the module itself"
    else:
        got = type(model).__name__
    raise TypeError(f"model must be a torch.nn.Module, got {got}")


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every accelerated module in `model` gets its original class back.

    Parameters and their gradients stay as they are; a model without accelerated modules too. Reports keep what they
    counted. A forward that something wrapped while it was accelerated is the original's from then on.

    Args:
        model: what was given to `accelerate`, or any module with accelerated ones inside.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: another library has put a class of its own on top of an accelerated module's, as `fully_shard` and
            parametrizations do; the model is left as it was.
    """
    _check_module(model)
    accelerated: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_accelerated(module)}
    for name, module in accelerated.items():
        kind = type(module)
        if "dab_fast_original" not in vars(kind):
            raise RuntimeError(
                f"{name or '(model)'} cannot be restored: its class is now {kind.__module__}.{kind.__qualname__}, put "
                "on top of the accelerated one since. Take that off first, or restore before it is put on"
            )
    for module in accelerated.values():
        module.dab_fast_end()


def refresh(model: nn.Module) -> None:
    """Drop whatever was derived from the parameters of `model`, such as folded weights; the next call derives it anew.

    A change is noticed without it: at the next call, and of one on a GPU that moves no version (a write through
    `.data`) one call later. To call this after such a write spares that call.

    Args:
        model: what was given to `accelerate`, or any module with accelerated ones inside.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    for module in model.modules():
        forget(module)
