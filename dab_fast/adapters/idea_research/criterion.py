"""The fast `SetCriterion` of IDEA-Research's repositories: all layers are matched and summed up at once.

The original's forward still runs, and what it asks of its matcher and its `get_loss` is known when it asks: so names,
order, the count of boxes over processes, denoising losses and whatever a fork adds are its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dab_fast._tracing import compiling, transformed
from dab_fast.accuracy import PROBE_TOLERANCE
from dab_fast.adapters._description import Code, Description
from dab_fast.adapters._fast import Fast
from dab_fast.adapters._probe import neutral, seeded_randn
from dab_fast.parameters import StepAside, check_unhooked

_MARKS = ("weight_dict", "losses", "focal_alpha", "num_classes")
_MATCHER_MARKS = ("cost_class", "cost_bbox", "cost_giou")
_MATCHER_ALPHA = 0.25  # of a matcher without one of its own

# What a call of `get_loss` may be asked for, and the names that are served; what else it is asked, it computes itself.
_QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("labels", {}),
    ("labels", {"log": True}),
    ("labels", {"log": False}),
    ("boxes", {}),
    ("cardinality", {}),
)
_SERVED = {"loss_ce", "class_error", "loss_bbox", "loss_giou", "loss_xy", "loss_hw", "cardinality_error"}


def looks_like_criterion(module: nn.Module) -> bool:
    matcher = module._modules.get("matcher")
    return (
        matcher is not None
        and all(hasattr(module, name) for name in (*_MARKS, "get_loss"))
        and all(hasattr(matcher, name) for name in _MATCHER_MARKS)
    )


@dataclass(frozen=True)
class Formula:
    """What a criterion computes."""

    giou_eps: float
    names: dict[tuple[str, tuple[tuple[str, Any], ...]], tuple[str, ...]]  # of the losses, by the question


class FastSetCriterion(Fast):
    """Mixed into a subclass of the user's own `SetCriterion`."""

    dab_fast_serves = ("criterion",)
    dab_fast_code: Code
    dab_fast_verdicts: list[tuple[Description, Formula | str]]  # or why it is not served

    @classmethod
    def dab_fast_why_not(cls, module: nn.Module) -> str | None:
        try:
            if changed := [name for name in ("forward", "get_loss") if name in vars(module)]:
                raise StepAside(f"its {changed[0]} is patched")
            code = getattr(type(module).forward, "__code__", None)
            if code is None or code.co_varnames[:3] != ("self", "outputs", "targets"):
                raise StepAside("its forward takes other arguments than outputs and targets")
            probe(module)
        except StepAside as reason:
            return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
        return None

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        self.dab_fast_code = Code(self, self.dab_fast_original)
        self.dab_fast_verdicts = [(Description(self, ()), probe(self))]

    def forward(self, outputs: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results."""
        try:
            answers = Answers(self, outputs, targets, self._dab_fast_formula())
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(outputs, targets, *args, **kwargs)
        token = _ANSWERS.set(answers)
        try:
            return super().forward(outputs, targets, *args, **kwargs)
        finally:
            _ANSWERS.reset(token)

    @property
    def matcher(self) -> Any:
        answers = _ANSWERS.get()
        return self._modules["matcher"] if answers is None or answers.owner is not self else answers

    def get_loss(self, loss: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any, **kwargs: Any) -> Any:
        answers = _ANSWERS.get()
        if answers is not None and answers.owner is self:
            found = answers.losses(loss, outputs, targets, indices, num_boxes, kwargs)
            if found is not None:
                return found
        return super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)  # type: ignore[misc]

    def _dab_fast_formula(self) -> Formula:
        """What it computes as it is now. Raises StepAside where that is not known."""
        if compiling() or transformed():
            raise StepAside("the criterion is traced or transformed")
        if (name := self.dab_fast_code.changed()) is not None:
            raise StepAside(f"{name} was patched after accelerate")
        if nn_module._has_any_global_hook():
            raise StepAside("a global module hook is registered")
        check_unhooked("matcher", self._modules["matcher"])  # type: ignore[arg-type]
        now = Description(self, ())
        verdict = next((verdict for known, verdict in self.dab_fast_verdicts if known == now), None)
        if verdict is None:
            if len(self.dab_fast_verdicts) >= _MOST_VERDICTS:
                raise StepAside(f"{self.dab_fast_verdicts[0][0].changes(now)} keeps changing")
            try:
                verdict = probe(self)
            except StepAside as reason:
                verdict = f"{self.dab_fast_verdicts[0][0].changes(now)} changed, and {reason}"
            self.dab_fast_verdicts.append((now, verdict))
        if isinstance(verdict, str):
            raise StepAside(verdict)
        return verdict


_MOST_VERDICTS = 16  # a probe takes as long as some calls


@functools.cache
def fast_subclass(original: type[nn.Module]) -> type[FastSetCriterion]:
    body = {
        "dab_fast_original": original,
        "__doc__": f"{original.__module__}.{original.__qualname__} with the losses of dab_fast.",
    }
    return type(original.__name__, (FastSetCriterion, original), body)


class Answers:
    """The matches and losses of all layers of one call, in place of its criterion's matcher while that call runs.

    Raises:
        StepAside: the outputs or targets are not what `parts.matching` takes.
    """

    def __init__(self, owner: Any, outputs: Any, targets: Any, formula: Formula) -> None:
        from dab_fast.parts import criterion, matching  # with scipy, which only these need

        self.owner, self.formula, self._matcher, self._targets = owner, formula, owner._modules["matcher"], targets
        self._layers = [*outputs.get("aux_outputs", ()), outputs] if isinstance(outputs, Mapping) else []
        logits, boxes = ([x.get(name) for x in self._layers] for name in ("pred_logits", "pred_boxes"))
        for tensors in (logits, boxes):
            if {type(x) for x in tensors} != {Tensor} or len({(x.shape, x.dtype, x.device) for x in tensors}) > 1:
                raise StepAside("the layers' outputs are no tensors, or not alike")
        self._logits, self._boxes = torch.stack(logits), torch.stack(boxes)
        if self._logits.dim() != 4 or self._logits.shape[-1] != owner.num_classes:
            raise StepAside(f"the logits are {list(logits[-1].shape)}, and num_classes is {owner.num_classes}")
        asked: Any = self._matcher
        alpha = getattr(asked, "focal_alpha", _MATCHER_ALPHA)
        costs = matching.Costs(asked.cost_class, asked.cost_bbox, asked.cost_giou, alpha, formula.giou_eps)
        self._objects = matching.objects_of(targets, "labels", self._logits, self._boxes)
        self._matches = matching.match(self._logits, self._boxes, self._objects, costs)
        self._rules = criterion.Rules(owner.focal_alpha, formula.giou_eps, counts="last")
        self._indices = [
            [(torch.from_numpy(queries), torch.from_numpy(objects)) for queries, objects in images]
            for images in self._matches.pairs
        ]
        self._losses: tuple[Any, dict[str, tuple[Tensor, ...]]] | None = None  # of this number of boxes

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """What the matcher returns."""
        layer = self._layer(outputs, targets)
        return self._matcher(outputs, targets) if layer is None else self._indices[layer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def losses(
        self, loss: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any, kwargs: dict[str, Any]
    ) -> dict[str, Tensor] | None:
        """What `get_loss` returns, or None where it must compute that itself."""
        names = self.formula.names.get((loss, tuple(kwargs.items())))
        layer = self._layer(outputs, targets)
        if names is None or layer is None or indices is not self._indices[layer]:
            return None
        if "class_error" in names and layer != len(self._layers) - 1:
            return None
        if self._losses is None or self._losses[0] is not num_boxes:
            self._losses = num_boxes, self._all_losses(num_boxes)
        return {name: self._losses[1][name][layer] for name in names}

    def _layer(self, outputs: Any, targets: Any) -> int | None:
        """Which layer's outputs these are."""
        if targets is self._targets and isinstance(outputs, Mapping):
            for i, known in enumerate(self._layers):
                if all(outputs.get(name) is known[name] for name in ("pred_logits", "pred_boxes")):
                    return i
        return None

    def _all_losses(self, num_boxes: Any) -> dict[str, tuple[Tensor, ...]]:
        """Every served loss by name, of each layer."""
        from dab_fast.parts import criterion

        given = (self._logits, self._boxes, self._objects, self._matches, self._rules)
        found, distance = criterion.sums(*given, num_boxes)
        with torch.no_grad():
            sides = (distance.unflatten(1, (2, 2)).sum(2) / num_boxes).T
            counts = criterion.cardinality_error(self._logits, self._objects, self._rules)
            error = criterion.class_error(self._logits, self._objects, self._matches)
            logged = (*criterion.apart(sides), *criterion.apart(counts[None]))
        names = ("loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw", "cardinality_error")
        losses = dict(zip(names, (*criterion.apart(found), *logged), strict=True))
        return losses | {"class_error": (error,) * len(self._layers)}


_ANSWERS: ContextVar[Answers | None] = ContextVar("dab_fast_answers", default=None)


def probe(criterion: nn.Module) -> Formula:
    """What a criterion computes, found out on a copy. Raises StepAside unless that is what is known here."""
    check_unhooked("matcher", criterion._modules["matcher"])  # type: ignore[arg-type]
    with neutral(), torch.random.fork_rng(devices=[]):
        try:
            twin: Any = copy.deepcopy(criterion)
        except Exception as error:
            raise StepAside(f"it cannot be copied: {error}") from error
        if isinstance(twin, Fast):
            twin.dab_fast_end()
        reasons = []
        for giou_eps in (1e-6, 0.0):
            try:
                return _checked(twin, giou_eps)
            except StepAside as reason:
                reasons.append(str(reason))
        raise StepAside(reasons[0])


def _checked(criterion: Any, giou_eps: float) -> Formula:
    formula = Formula(giou_eps, {})
    for training in (True, False):
        criterion.train(training)
        for sizes in ((4, 0, 6, 1, 3), (0, 0)):
            _compare(criterion, formula, sizes)
    return formula


def _compare(criterion: Any, formula: Formula, sizes: tuple[int, ...]) -> None:
    """Raise StepAside unless pairs, losses and gradients are the same; adds to the formula's names."""
    outputs, targets = _random_case(criterion.num_classes, sizes)
    answers = Answers(criterion, outputs, targets, formula)
    for layer in (*outputs["aux_outputs"], outputs):
        leaves = [layer["pred_logits"], layer["pred_boxes"]]
        try:
            indices = criterion.matcher(layer, targets)
        except Exception as error:
            raise StepAside(f"its matcher raises {type(error).__name__} on random outputs: {error}") from error
        ours = answers(layer, targets)
        if not all(torch.equal(x, y) for a, b in zip(indices, ours, strict=True) for x, y in zip(a, b, strict=True)):
            raise StepAside("its matcher finds other pairs")
        for loss, kwargs in _QUESTIONS:
            if loss not in criterion.losses:
                continue
            try:
                theirs = criterion.get_loss(loss, layer, targets, indices, _NUM_BOXES, **kwargs)
            except TypeError:
                continue  # it knows no `log`
            except Exception as error:
                raise StepAside(f"its {loss} raise {type(error).__name__} on random outputs: {error}") from error
            if not isinstance(theirs, dict) or not _SERVED.issuperset(theirs):
                continue
            formula.names[loss, tuple(kwargs.items())] = tuple(theirs)
            known = answers.losses(loss, layer, targets, ours, _NUM_BOXES, kwargs)
            for name, x in () if known is None else known.items():
                _compare_loss(name, theirs[name], x, leaves)


_NUM_BOXES = 7.0


def _compare_loss(name: str, theirs: Any, ours: Tensor, leaves: list[Tensor]) -> None:
    if type(theirs) is not Tensor or theirs.shape != ours.shape or theirs.requires_grad != ours.requires_grad:
        raise StepAside(f"its {name} is no number like that of the original")
    pairs = [(theirs.detach(), ours.detach())]
    if ours.requires_grad:
        pairs += zip(*(_gradients(x, leaves) for x in (theirs, ours)), strict=True)
    for a, b in pairs:
        if not (a - b).norm() <= PROBE_TOLERANCE * a.norm().clamp(min=1e-3):
            raise StepAside(f"its {name} is not what the original computes")


def _gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _random_case(classes: int, sizes: tuple[int, ...]) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Outputs of two layers, and targets, each nearly hit by eight queries, so that every term of a cost decides.

    Every third is so small that the eps of GIoU does, too.
    """
    randn = seeded_randn()
    targets, layers = [], []
    for n in sizes:
        boxes = randn(n, 4).sigmoid()
        boxes[::3, 2:] *= 2e-3
        targets.append({"labels": randn(n).mul(1e4).long() % classes, "boxes": boxes})
    for _ in range(2):
        boxes = randn(len(sizes), 8 * max(*sizes, 1), 4).sigmoid()
        for image, target in zip(boxes, targets, strict=True):
            center, size = target["boxes"].repeat(8, 1).chunk(2, -1)
            hits = torch.cat((center + 0.2 * size * randn(size.shape), size * (0.2 * randn(size.shape)).exp()), -1)
            image[: len(hits)] = hits.abs()
        logits = randn(*boxes.shape[:2], classes)
        layers.append({"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()})
    return layers[1] | {"aux_outputs": layers[:1]}, targets
