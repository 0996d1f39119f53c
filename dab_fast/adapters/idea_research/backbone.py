"""The fast forward of IDEA-Research's backbone: torchvision's ResNet, cut by its `IntermediateLayerGetter`.

The norms are the codebase's own `FrozenBatchNorm2d`, or torchvision's. This file needs no torchvision.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dab_fast._tracing import apart, compiling, exporting, transformed
from dab_fast.adapters._backbone import (
    NORM_TENSORS,
    FastBackbone,
    block,
    check_relu,
    check_shapes,
    convolution,
    pool,
    probe,
)
from dab_fast.adapters._fast import UNREADABLE, FastPart, same
from dab_fast.adapters._probe import neutral, seeded_randn
from dab_fast.adapters.idea_research._recognised import Recognised
from dab_fast.adapters.idea_research.models import hashable_settings
from dab_fast.parameters import PARAMETERS, StepAside, gather
from dab_fast.parts.resnet import Plan, forward

_STEM = ["conv1", "bn1", "relu", "maxpool"]
_STAGES = ["layer1", "layer2", "layer3", "layer4"]
_BLOCK_MARKS = {"conv1", "bn1", "conv2", "bn2", "relu"}


class Reading(NamedTuple):
    plan: Plan
    outputs: tuple[tuple[int, str], ...]  # as `parts.resnet.forward` numbers them, and their names in the result
    channels: int  # of the images


def looks_like_body(module: nn.Module) -> bool:
    names = list(module._modules)
    return (
        isinstance(module, nn.ModuleDict)
        and isinstance(vars(module).get("return_layers"), dict)
        and len(names) > len(_STEM)
        and names == (_STEM + _STAGES)[: len(names)]
    )


class FastBody(FastBackbone, Recognised):
    """Mixed into a subclass of `IntermediateLayerGetter`."""

    dab_fast_serves = ("backbone",)
    dab_fast_reads = frozenset()

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], Reading]:
        return read(module)

    @staticmethod
    def dab_fast_settings(module: Any) -> dict[str, Any]:
        return {"return_layers": tuple(module.return_layers.items())}

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: Reading) -> None:
        def original(body: nn.Module, images: Tensor) -> list[Tensor]:
            kind = body.dab_fast_original if isinstance(body, FastPart) else type(body)
            found = kind.forward(body, images)
            if list(found) != [name for _, name in reading.outputs]:
                raise StepAside(f"its feature maps are named {', '.join(map(str, found))}")
            return list(found.values())

        def fast(body: nn.Module, images: Tensor) -> list[Tensor]:
            return list(_run(body, *read(body), images).values())

        probe(module, original, fast, reading.channels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results."""
        if compiling() or exporting():  # a compiler joins the small calls itself, and a graph outlives what is kept
            return super().forward(*args, **kwargs)
        try:
            if transformed():
                raise StepAside("torch.func or forward-mode AD is at work")
            (images,) = self.dab_fast_given(args, kwargs, self.dab_fast_names[:1], self.dab_fast_names[:1])
            tensors, reading = self.dab_fast_served()
            if images.dim() == 4 and images.shape[1] != reading.channels:
                raise StepAside(f"the images have {images.shape[1]} channels, not {reading.channels}")
            return _run(self, tensors, reading, images)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(*args, **kwargs)


def _run(body: nn.Module, tensors: dict[str, Tensor], reading: Reading, images: Tensor) -> OrderedDict[str, Tensor]:
    found = forward(reading.plan, tensors, images, [i for i, _ in reading.outputs], body)
    return OrderedDict((name, x) for (_, name), x in zip(reading.outputs, found, strict=True))


def read(body: Any) -> tuple[dict[str, Tensor], Reading]:
    """The tensors of a backbone by their names below `body`. Raises StepAside where it cannot be read."""
    try:
        stages = {name: x for name, x in body._modules.items() if name in _STAGES}
        if unknown := body.return_layers.keys() - stages.keys():
            raise StepAside(f"the backbone gives the features of {', '.join(sorted(unknown))}, too")
        blocks = {type(x) for stage in stages.values() for x in stage if set(x._modules) >= _BLOCK_MARKS}
        norm = type(body.bn1)
        eps = same("eps", {_eps(module) for module in body.modules() if type(module) is norm})
        containers = (nn.Sequential, nn.MaxPool2d, *blocks)
        known = {**PARAMETERS, nn.Conv2d: ("weight",), norm: NORM_TENSORS}
        tensors = gather(body, lambda module: type(module) in containers, lambda name: name, known)
        check_relu(body.relu, "relu")
        plan = Plan(
            convolution(body.conv1, "conv1", "bn1"),
            pool(body.maxpool, "maxpool"),
            tuple(
                tuple(block(x, f"{name}.{i}", ("relu",)) for i, x in enumerate(stage)) for name, stage in stages.items()
            ),
            eps,
        )
        check_shapes(plan, tensors)
    except UNREADABLE as error:
        raise StepAside(f"the backbone is not as torchvision builds it: {error}") from None
    outputs = tuple((i, body.return_layers[x]) for i, x in enumerate(stages, start=1) if x in body.return_layers)
    return tensors, Reading(plan, outputs, tensors["conv1.weight"].shape[1] * plan.stem.groups)


def _eps(norm: nn.Module) -> float:
    """The eps of a frozen norm, found out once. Raises StepAside where it is no such norm."""
    if set(norm._buffers) != set(NORM_TENSORS) or norm._parameters or norm._modules:
        raise StepAside(f"its norm is a {type(norm).__module__}.{type(norm).__qualname__}, which is not frozen")
    key = (type(norm), type(norm).forward, hashable_settings(norm))
    if key not in _EPS:
        _EPS[key] = apart(lambda: _found_eps(norm))
    if not (eps := _EPS[key]):
        raise StepAside(f"its {type(norm).__qualname__} is not (x - mean) / sqrt(var + eps) * weight + bias")
    return eps


_EPS: dict[Any, float] = {}  # 0 for another formula


@torch.no_grad()
def _found_eps(norm: nn.Module) -> float:
    """Of a twin with buffers of its own, since the norm's may be anywhere."""
    with neutral():
        randn = seeded_randn()
        twin = copy.copy(norm)
        x, weight, bias, mean, var = (randn(4).double() for _ in range(5))

        def run(var: Tensor) -> Tensor:
            buffers = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
            twin.__dict__ = vars(norm) | {"_buffers": buffers}
            return type(norm).forward(twin, x.view(1, 4, 1, 1)).view(4)

        try:
            eps = float(f"{(((x - mean) * weight / (run(torch.zeros_like(var)) - bias)) ** 2)[0]:.6g}")
            right = (x - mean) * (var.abs() + eps).rsqrt() * weight + bias
            same = torch.allclose(run(var.abs()), right, rtol=1e-4, atol=1e-4)
        except Exception:
            return 0.0
        return eps if same and 0.0 < eps < 0.1 else 0.0
