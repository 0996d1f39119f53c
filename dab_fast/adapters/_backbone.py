"""What the backbones of all codebases share: how a ResNet is read, when what was folded goes, and the probe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dab_fast.accuracy import PROBE_TOLERANCE
from dab_fast.adapters._fast import FastPart
from dab_fast.adapters._probe import compare_gradients, gradients, neutral, seeded_randn
from dab_fast.parameters import StepAside
from dab_fast.parts.folding import forget
from dab_fast.parts.resnet import Block, Convolution, Plan

# A backbone's forward: of the module and images [B, 3, height, width], the feature maps.
Forward = Callable[[nn.Module, Tensor], list[Tensor]]

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FastBackbone(FastPart):
    """A fast part for which folded weights are kept, as long as they are of use."""

    def dab_fast_end(self) -> None:
        forget(self)
        super().dab_fast_end()

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:  # Trainers call it at every step
            forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)
        return super()._apply(*args, **kwargs)


def convolution(module: Any, name: str, norm: str) -> Convolution:
    """The plan of a convolution. Raises StepAside where it has more than a weight."""
    kind = type(module)
    if kind is not nn.Conv2d:
        raise StepAside(f"{name} is a {kind.__module__}.{kind.__qualname__}")
    if module.bias is not None or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise StepAside(f"{name} has a bias, or padding other than zeros")
    if "_conv_forward" in vars(module):
        raise StepAside(f"{name} has a patched forward")
    return Convolution(name, norm, module.stride, module.padding, module.dilation, module.groups)


def pool(module: Any, name: str) -> dict[str, Any]:
    """The arguments of max_pool2d."""
    if type(module) is not nn.MaxPool2d or module.return_indices:
        raise StepAside(f"{name} is {module}")
    return {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}


def block(module: Any, name: str, relus: tuple[str, ...]) -> Block:
    """The plan of a block as torchvision and timm write it: conv1, bn1, conv2, bn2 and so on, and downsample.

    Args:
        relus: names of its activations.
    """
    for relu in relus:
        check_relu(getattr(module, relu), f"{name}.{relu}")
    numbers = [key.removeprefix("conv") for key in module._modules if key.startswith("conv")]
    branch = tuple(convolution(getattr(module, f"conv{i}"), f"{name}.conv{i}", f"{name}.bn{i}") for i in numbers)
    if module.downsample is None:
        return Block(branch, None)
    if type(module.downsample) is not nn.Sequential or len(module.downsample) != 2:
        raise StepAside(f"{name}.downsample is {module.downsample}")
    return Block(branch, convolution(module.downsample[0], f"{name}.downsample.0", f"{name}.downsample.1"))


def check_relu(module: Any, name: str) -> None:
    if type(module) is not nn.ReLU:
        raise StepAside(f"{name} is {module}, not a ReLU")


def check_shapes(plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Raise StepAside unless these are the tensors of the plan, each norm as wide as its convolution."""
    expected = set()
    for layer in plan.convolutions():
        expected |= {f"{layer.name}.weight"} | {f"{layer.norm}.{key}" for key in NORM_TENSORS}
        width = tensors[f"{layer.name}.weight"].shape[0]
        for key in NORM_TENSORS:
            if tuple(tensors[f"{layer.norm}.{key}"].shape) != (width,):
                raise StepAside(f"{layer.norm}.{key} must have shape [{width}]")
    if unknown := tensors.keys() - expected:
        raise StepAside(f"the original has no {', '.join(sorted(unknown))}")


def probe(module: nn.Module, original: Forward, fast: Forward, channels: int) -> None:
    """Raise StepAside unless both forwards agree on a narrow copy with random parameters and buffers.

    In evaluation and in training, with gradients and without.

    Args:
        channels: of the images.
    """
    with neutral():
        randn = seeded_randn()
        try:
            module = _narrow_copy(module, randn)
        except Exception as error:
            raise StepAside(f"it cannot be copied: {error}") from error
        images = randn(2, channels, 33, 65)  # the smallest that give the last stage several odd-sized pixels
        for training, grad in ((False, False), (False, True), (True, True), (True, False)):
            module.train(training).requires_grad_(grad)
            _compare(module, original, fast, images.detach().requires_grad_(grad), " in training" if training else "")


def _compare(module: nn.Module, original: Forward, fast: Forward, images: Tensor, when: str) -> None:
    with torch.set_grad_enabled(images.requires_grad):
        try:
            expected = fast(module, images)
        except Exception as error:
            raise StepAside(f"the fast forward does not know it{when}: {type(error).__name__}: {error}") from error
        random_state = torch.get_rng_state()
        try:
            got = list(original(module, images))
        except Exception as error:
            raise StepAside(f"its forward raises {type(error).__name__} on a copy{when}: {error}") from error
    if not torch.equal(torch.get_rng_state(), random_state):
        raise StepAside(f"it draws random numbers{when}")
    for x, right in zip(got, expected, strict=True):
        if x.shape != right.shape:
            raise StepAside(f"its feature map has shape {list(x.shape)}{when}, not {list(right.shape)}")
        difference = ((x - right).abs().max() / right.abs().max()).item()  # deep random networks have large features
        if not difference <= PROBE_TOLERANCE:
            raise StepAside(
                f"its feature maps are not what the original computes{when}: {difference:.1e} of the largest"
            )
    if images.requires_grad:
        leaves = {"pixel_values": images} | dict(module.named_parameters())
        compare_gradients(list(leaves), gradients(got, leaves), gradients(expected, leaves), when)


# Where a network has at least this many channels, the copy has a part of them: values are compared as well there.
_WIDE, _NARROWED = 64, 8


@torch.no_grad()
def _narrow_copy(module: nn.Module, randn: Callable[..., Tensor]) -> nn.Module:
    """A float32 copy on the CPU with fewer channels, whose parameters and buffers hide nothing."""
    memo: dict[int, Any] = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        shape = [size // _NARROWED if size >= _WIDE else size for size in x.shape]
        noise = randn(shape)
        if x.dim() > 1:
            memo[id(x)] = nn.Parameter(noise * (noise[0].numel() / 2) ** -0.5)
        elif name.endswith("running_var"):
            memo[id(x)] = 0.5 + noise.abs()
        else:
            memo[id(x)] = (1.0 if name.endswith("weight") else 0.2) + 0.3 * noise
    return copy.deepcopy(module, memo)
