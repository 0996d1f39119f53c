"""How transformers' wrapper of a timm ResNet is read. This file needs no timm: what it reads has imported it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from dab_fast.adapters._backbone import block, check_relu, convolution, pool
from dab_fast.parameters import StepAside
from dab_fast.parts.resnet import Plan

_STEM = ["conv1", "bn1", "act1", "maxpool"]
_STAGES = ["layer1", "layer2", "layer3", "layer4"]


def containers() -> tuple[type, ...]:
    """The classes of such a wrapper's modules, but for those with tensors."""
    return (nn.Sequential, nn.Identity, nn.MaxPool2d, _wrapper(), _features(), *_blocks())


def is_known(backbone: Any) -> bool:
    """Whether this is a wrapper of a timm network that has a ResNet's layers and blocks."""
    if type(backbone) is not _wrapper():
        return False
    network: Any = backbone._backbone
    names = list(getattr(network, "_modules", ()))
    if type(network) is not _features() or names != (_STEM + _STAGES)[: len(names)] or len(names) <= len(_STEM):
        return False
    stages = [getattr(network, name) for name in names[len(_STEM) :]]
    return type(network.conv1) is nn.Conv2d and all(type(x) in _blocks() for stage in stages for x in stage)


def settings(backbone: Any) -> dict[str, Any]:
    """What its forward reads elsewhere than in attributes that a description has."""
    return {
        "return_layers": tuple(backbone._backbone.return_layers.items()),
        "config": tuple(getattr(backbone.config, name, None) for name in ("return_dict", "output_hidden_states")),
    }


def outputs(backbone: Any) -> tuple[int, ...]:
    """As `parts.resnet.forward` numbers them. Raises StepAside."""
    if not backbone.config.return_dict or backbone.config.output_hidden_states:
        raise StepAside("the backbone's config has return_dict=False or output_hidden_states=True")
    wanted = backbone._backbone.return_layers
    if unknown := wanted.keys() - set(_STAGES):
        raise StepAside(f"the backbone gives the features of {', '.join(sorted(unknown))}, too")
    return tuple(i for i, name in enumerate(_STAGES, start=1) if name in wanted)


def plan(backbone: Any, eps: float) -> Plan:
    """Raises StepAside."""
    network, prefix = backbone._backbone, "model._backbone"
    if network.grad_checkpointing:
        raise StepAside("the backbone has grad_checkpointing set")
    check_relu(network.act1, f"{prefix}.act1")
    stages = []
    for stage in (name for name in network._modules if name in _STAGES):
        blocks = []
        for i, x in enumerate(getattr(network, stage)):
            name = f"{prefix}.{stage}.{i}"
            if x.se is not None or x.drop_path is not None or not type(x.aa) is type(x.drop_block) is nn.Identity:
                raise StepAside(f"{name} has an attention, drops paths or blocks, or blurs")
            blocks.append(block(x, name, tuple(key for key in x._modules if key.startswith("act"))))
        stages.append(tuple(blocks))
    stem = convolution(network.conv1, f"{prefix}.conv1", f"{prefix}.bn1")
    return Plan(stem, pool(network.maxpool, f"{prefix}.maxpool"), tuple(stages), eps)


def _wrapper() -> Any:
    return _loaded("transformers.models.timm_backbone.modeling_timm_backbone", "TimmBackbone")


def _features() -> Any:
    return _loaded("timm.models._features", "FeatureListNet")


def _blocks() -> tuple[Any, ...]:
    return tuple(_loaded("timm.models.resnet", name) for name in ("BasicBlock", "Bottleneck"))


def _loaded(module: str, name: str) -> Any:
    """A class of a module that has been imported; else None, which is no module's class."""
    return getattr(sys.modules.get(module), name, None)
