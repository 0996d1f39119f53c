"""A ResNet whose batch norms are frozen: y = relu(conv(x) * scale + shift), with

    scale = weight / sqrt(running_var + eps),  shift = bias - running_mean * scale.

Convolution and norm are one convolution, with weights times scale and a bias of shift (folded in float32 at least). For
inference the folded weights are kept; in training they are computed anew in forward and in backward, so that backward
keeps what it does for a plain convolution followed by a relu. Under autocast, where the original's norms promote to
float32, the norm is one `addcmul` after the convolution, in the same dtypes.

On a CPU in float32 the sum of a block is computed by oneDNN's convolution itself. A relu is always PyTorch's, in place:
oneDNN's own would turn NaN into 0, and in the time of a block it is within noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dab_fast._first_derivative import first_derivative_only
from dab_fast.parameters import StepAside
from dab_fast.parts import onednn
from dab_fast.parts.folding import derived
from dab_fast.precision import at_least_float32, autocast_on

Pair = tuple[int, int]


class Convolution(NamedTuple):
    """A convolution without bias, and the frozen norm behind it."""

    name: str  # its weight is the tensor f"{name}.weight"
    norm: str  # the norm's tensors are f"{norm}.weight", .bias, .running_mean, .running_var
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def settings(self) -> tuple[Pair, Pair, Pair, int]:
        """The arguments of conv2d behind the bias."""
        return self.stride, self.padding, self.dilation, self.groups


class Block(NamedTuple):
    """relu(branch(x) + shortcut(x)), where each convolution of the branch but the last is followed by a relu."""

    branch: tuple[Convolution, ...]
    shortcut: Convolution | None  # None: x itself


class Plan(NamedTuple):
    """A ResNet: stem, relu, max pooling, and stages of blocks."""

    stem: Convolution
    pool: dict[str, Any]  # arguments of max_pool2d
    stages: tuple[tuple[Block, ...], ...]
    eps: float

    def convolutions(self) -> Iterator[Convolution]:
        """In the order in which they run."""
        yield self.stem
        for block in (block for stage in self.stages for block in stage):
            yield from block.branch
            if block.shortcut is not None:
                yield block.shortcut


# relu(norm(convolution(x)) + residual), with or without either; may overwrite the residual, and nothing else.
Step = Callable[[Convolution, Tensor, bool, "Tensor | None"], Tensor]


def forward(
    plan: Plan,
    tensors: dict[str, Tensor],  # by name: conv weights [O, I / groups, kh, kw], norms' tensors [O]
    x: Tensor,  # [B, 3, height, width]
    outputs: Sequence[int],  # 0: the stem's result after pooling, i: the i-th stage's
    owner: nn.Module,
) -> list[Tensor]:
    """The feature maps [B, C_i, height_i, width_i], in the memory layout that the plain convolutions give.

    Args:
        owner: the module that holds the tensors, for which what is derived from them is kept.

    Raises:
        StepAside: x or the parameters have another dtype or device than this knows.
    """
    _check(plan, tensors, x)
    step = _choose(plan, tensors, x, owner)
    weights = [tensors[f"{convolution.name}.weight"] for convolution in plan.convolutions()]
    layout = torch.channels_last if any(map(_is_channels_last, (x, *weights))) else torch.contiguous_format
    results: dict[int, Tensor] = {}

    def give(i: int, x: Tensor) -> Tensor:
        """Keeps a result that is asked for, and gives what may be overwritten."""
        if i not in outputs:
            return x
        results[i] = x.contiguous(memory_format=layout)
        return x.clone() if results[i] is x and i < len(plan.stages) else x

    x = step(plan.stem, x.contiguous(memory_format=torch.channels_last), False, None)
    x = give(0, F.max_pool2d(x, **plan.pool).relu_())  # the relu of the largest is the largest relu
    for i, stage in enumerate(plan.stages, start=1):
        for block in stage:
            y = x
            for convolution in block.branch[:-1]:
                y = step(convolution, y, True, None)
            residual = x if block.shortcut is None else step(block.shortcut, x, False, None)
            x = step(block.branch[-1], y, True, residual)
        x = give(i, x)
    return [results[i] for i in outputs]


def _check(plan: Plan, tensors: dict[str, Tensor], x: Tensor) -> None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise StepAside(f"the images are a {type(x).__module__}.{type(x).__qualname__}")
    if x.dim() != 4 or not x.numel():
        raise StepAside(f"the images have shape {list(x.shape)}")
    if devices := {t.device for t in tensors.values()} - {x.device}:
        raise StepAside(f"the images are on {x.device}, and parameters on {', '.join(sorted(map(str, devices)))}")
    dtypes = {t.dtype for t in tensors.values()}
    if not autocast_on(x) and dtypes != {x.dtype}:
        raise StepAside(f"the images are {x.dtype}, and the parameters {', '.join(sorted(map(str, dtypes)))}")


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _choose(plan: Plan, tensors: dict[str, Tensor], x: Tensor, owner: nn.Module) -> Step:
    if not autocast_on(x) and not (torch.is_grad_enabled() and _requires_grad(tensors, x)):
        folded = derived(owner, ("folded", plan), list(tensors.values()), lambda: _Folded(plan, tensors))
        return folded.step(x)
    buffers = [tensors[name] for c in plan.convolutions() for name in _norm_names(c)]
    affine = derived(owner, ("affine", plan), buffers, lambda: _affine(plan, tensors))
    if autocast_on(x):
        return functools.partial(_promoting_step, tensors, affine)
    return functools.partial(_training_step, tensors, affine)


def _requires_grad(tensors: dict[str, Tensor], x: Tensor) -> bool:
    return x.requires_grad or any(t.requires_grad for t in tensors.values())


def _norm_names(convolution: Convolution) -> list[str]:
    return [f"{convolution.norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]


Affine = dict[Convolution, tuple[Tensor, Tensor]]  # scale and shift [1, O, 1, 1], float32 at least


def _affine(plan: Plan, tensors: dict[str, Tensor]) -> Affine:
    affine = {}
    for convolution in plan.convolutions():
        weight, bias, mean, var = (at_least_float32(tensors[name]) for name in _norm_names(convolution))
        scale = weight * (var + plan.eps).rsqrt()
        shift = bias - mean * scale
        affine[convolution] = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    return affine


def _folded_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale, rounded once to the weight's dtype, channels last. Not differentiable."""
    folded = torch.empty_like(weight, memory_format=torch.channels_last)
    return torch.mul(weight, scale.view(-1, 1, 1, 1), out=folded)


def _finish(y: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """In y's memory."""
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


class _Folded:
    """The folded weights of a plan: [O, I / groups, kh, kw] channels last, and [O]."""

    def __init__(self, plan: Plan, tensors: dict[str, Tensor]) -> None:
        self.weights: dict[Convolution, tuple[Tensor, Tensor]] = {}
        for convolution, (scale, shift) in _affine(plan, tensors).items():
            weight = tensors[f"{convolution.name}.weight"]
            self.weights[convolution] = _folded_weight(weight, scale), shift.flatten().to(weight.dtype)
        self._reordered: tuple[torch.Size, dict[Convolution, Tensor]] | None = None  # as oneDNN wants them for a size
        self._last_size: torch.Size | None = None

    def nbytes(self) -> int:
        reordered = self._reordered
        kept = [x for pair in self.weights.values() for x in pair] + list(reordered[1].values() if reordered else ())
        return sum(x.numel() * x.element_size() for x in kept)

    def step(self, x: Tensor) -> Step:
        if not onednn.serves(x):
            return self._plain_step
        # oneDNN wants another order for another size, and the wrong one is slower than none: only where a size comes
        # again is it worth the time.
        reordered = self._reordered
        if (reordered is None or reordered[0] != x.shape) and self._last_size == x.shape:
            reordered = self._reordered = x.shape, {}
        self._last_size = x.shape
        return functools.partial(self._onednn_step, reordered[1] if reordered and reordered[0] == x.shape else None)

    def _plain_step(self, convolution: Convolution, x: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
        weight, bias = self.weights[convolution]
        return _finish(F.conv2d(x, weight, bias, *convolution.settings()), relu, residual)

    def _onednn_step(
        self,
        reordered: dict[Convolution, Tensor] | None,
        convolution: Convolution,
        x: Tensor,
        relu: bool,
        residual: Tensor | None,
    ) -> Tensor:
        weight, bias = self.weights[convolution]
        if reordered is not None:
            if convolution not in reordered:
                reordered[convolution] = onednn.reordered(weight, *convolution.settings(), x.shape)
            weight = reordered[convolution]
        y = onednn.convolution(x, weight, bias, *convolution.settings(), residual)
        return y.relu_() if relu else y


def _training_step(
    tensors: dict[str, Tensor],
    affine: Affine,
    convolution: Convolution,
    x: Tensor,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    weight, scale_and_shift = tensors[f"{convolution.name}.weight"], affine[convolution]
    x, convolution = _without_stride(x, weight, convolution)
    result: Tensor = _ConvolutionAndNorm.apply(x, weight, residual, *scale_and_shift, convolution, relu)
    return result


# Of oneDNN: input channels that it takes at a time, at most.
_BLOCK = 16


def _without_stride(x: Tensor, weight: Tensor, convolution: Convolution) -> tuple[Tensor, Convolution]:
    """What gives the same, where oneDNN's gradient of a weight writes past its own memory.

    It does so channels last, for a 1x1 convolution with a stride whose input is narrower than a block (oneDNN issue
    6035).
    """
    if (
        weight.requires_grad
        and x.device.type == "cpu"
        and weight.shape[2:] == (1, 1)
        and weight.shape[1] < _BLOCK
        and convolution.stride != (1, 1)
        and convolution.padding == (0, 0)
    ):
        rows, columns = convolution.stride
        return x[:, :, ::rows, ::columns], convolution._replace(stride=(1, 1))
    return x, convolution


class _ConvolutionAndNorm(torch.autograd.Function):
    """relu(conv(x, weight * scale) + shift + residual). Keeps x, and with a relu the result."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        convolution: Convolution,
        relu: bool,
    ) -> Tensor:
        y = F.conv2d(x, _folded_weight(weight, scale), shift.flatten().to(weight.dtype), *convolution.settings())
        y = _finish(y, relu, residual)
        ctx.save_for_backward(x, weight, scale, y if relu else None)
        ctx.convolution = convolution
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale, y = saved
        (d_y,) = d_outputs
        assert d_y is not None
        if y is not None:
            d_y = torch.ops.aten.threshold_backward(d_y, y, 0)
        stride, padding, dilation, groups = ctx.convolution.settings()
        needs_x, needs_weight, needs_residual, *_ = ctx.needs_input_grad
        d_x = d_weight = None
        if needs_x or needs_weight:
            d_x, d_folded, _ = torch.ops.aten.convolution_backward(
                d_y,
                x,
                _folded_weight(weight, scale),
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                [needs_x, needs_weight, False],
            )
            if needs_weight:  # with the parameter's strides, which DDP's buckets have
                d_weight = torch.mul(d_folded, scale.view(-1, 1, 1, 1), out=torch.empty_like(weight))
        return d_x, d_weight, d_y if needs_residual else None, None, None, None, None


def _promoting_step(
    tensors: dict[str, Tensor],
    affine: Affine,
    convolution: Convolution,
    x: Tensor,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """As the original: the convolution in autocast's dtype, the rest in that dtype and the buffers' promoted."""
    dtype = tensors[f"{convolution.norm}.bias"].dtype
    scale, shift = (t.to(dtype) for t in affine[convolution])
    weight = tensors[f"{convolution.name}.weight"]
    x, convolution = _without_stride(x, weight, convolution)
    if weight.requires_grad and weight.stride(3) == 1:  # as its gradient shall be, for DDP's buckets
        weight = weight.flatten(1).view_as(weight)
    y = F.conv2d(x, weight, None, *convolution.settings())
    return _finish(torch.addcmul(shift, y, scale), relu, residual)
