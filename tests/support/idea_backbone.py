"""The backbone of an IDEA-Research model, written a second time: a small ResNet as torchvision has it, in a dict."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from tests.support.backbone import randomize_buffers


class FrozenNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(width))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(width))

    def forward(self, x):
        mean, var, weight, bias = (
            b[:, None, None] for b in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        factor = weight / (var + self.eps).sqrt()
        return x * factor + (bias - mean * factor)


class Block(nn.Module):
    """A basic block with two convolutions, a bottleneck with three."""

    def __init__(self, given, wide, stride, dilation=1, *, bottleneck, norm=FrozenNorm):
        super().__init__()
        narrow = wide // 4 if bottleneck else wide
        three = dict(stride=stride, padding=dilation, dilation=dilation)
        sizes = [(given, narrow, 1, {}), (narrow, narrow, 3, three), (narrow, wide, 1, {})]
        if not bottleneck:
            sizes = [(given, wide, 3, three), (wide, wide, 3, dict(padding=1))]
        self.count = len(sizes)
        for i, (inner, outer, kernel, settings) in enumerate(sizes, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(inner, outer, kernel, bias=False, **settings))
            self.add_module(f"bn{i}", norm(outer))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or given != wide:
            self.downsample = nn.Sequential(nn.Conv2d(given, wide, 1, stride, bias=False), norm(wide))

    def forward(self, x):
        short = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.count + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = self.relu(x if i < self.count else x + short)
        return x


class Body(nn.ModuleDict):
    """The stages up to the last one that is asked for."""

    def __init__(self, layers, return_layers):
        super().__init__(layers)
        self.return_layers = return_layers

    def forward(self, x):
        out = OrderedDict()
        for name, layer in self.items():
            x = layer(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


def body(*, bottleneck=True, dilation=False, all_stages=False, norm=FrozenNorm):
    """In eval mode, with buffers that hide nothing."""
    torch.manual_seed(0)
    layers = OrderedDict(conv1=nn.Conv2d(3, 8, 7, 2, 3, bias=False), bn1=norm(8), relu=nn.ReLU(inplace=True))
    layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    given = 8
    for i, wide in enumerate((16, 16, 32, 32), start=1):
        dilated = dilation and i == 4
        stride = 1 if i == 1 or dilated else 2
        first = Block(given, wide, stride, bottleneck=bottleneck, norm=norm)
        second = Block(wide, wide, 1, 2 if dilated else 1, bottleneck=bottleneck, norm=norm)
        layers[f"layer{i}"] = nn.Sequential(first, second)
        given = wide
    module = Body(layers, {f"layer{i}": str(i - 1) for i in range(1, 5)} if all_stages else {"layer4": "0"})
    randomize_buffers(module)
    return module.eval()
