"""The backbone of IDEA-Research's models: feature maps, gradients, and what is left to the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import dab_fast
from tests.support.backbone import TOLERANCE, randomize_buffers
from tests.support.idea_backbone import FrozenNorm, body
from tests.support.models import assert_same_gradients

IMAGES = torch.randn(2, 3, 64, 97, generator=torch.Generator().manual_seed(4))


def accelerated(theirs):
    ours = copy.deepcopy(theirs)
    report = dab_fast.accelerate(ours)
    assert report.parts == {"": ("backbone",)}, report
    return ours


def assert_same(ours, theirs, images=IMAGES):
    found, expected = ours(images), theirs(images)
    assert type(found) is OrderedDict and list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].stride() == x.stride()
        torch.testing.assert_close(found[name], x, rtol=0, atol=TOLERANCE * x.abs().max().item())
    assert not ours.dab_fast_reasons


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize("all_stages", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_feature_maps(bottleneck, all_stages, dilation, grad):
    theirs = body(bottleneck=bottleneck, all_stages=all_stages, dilation=dilation)
    ours = accelerated(theirs)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert_same(ours, theirs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [False, True])
def test_gradients(training):
    theirs = body().double()
    gradients = []
    for module in (accelerated(theirs), theirs):
        module.train(training)
        given = IMAGES.double().requires_grad_()
        x = module(given)["0"]
        (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
        gradients.append({"images": given.grad} | {name: p.grad for name, p in module.named_parameters()})
    assert_same_gradients(*gradients)


def test_the_eps_of_the_norm_is_found():
    """With variances as small as eps, a wrong one is seen at once."""
    theirs = body(norm=partial(FrozenNorm, eps=1e-3))
    for name, x in theirs.named_buffers():
        if name.endswith("running_var"):
            x.fill_(1e-4)
        elif name.endswith("weight"):
            x.mul_(0.03)
    with torch.no_grad():
        assert_same(accelerated(theirs), theirs)


def test_written_weights_are_followed():
    theirs = body()
    ours = accelerated(theirs)
    with torch.no_grad():
        assert_same(ours, theirs)
        for module in (ours, theirs):
            module["layer2"][0].conv1.weight.data.mul_(2)
            module["bn1"].running_mean.data.add_(0.3)
        assert_same(ours, theirs)


class Shifted(FrozenNorm):
    def forward(self, x):
        return super().forward(x) + 0.1


class Stochastic(nn.Sequential):
    pass


def test_what_is_left_to_the_original():
    for change, reason in (
        (lambda x: x.update({"bn1": nn.BatchNorm2d(8)}), "bn1 is a torch.nn.modules.batchnorm.BatchNorm2d|not frozen"),
        (lambda x: [setattr(m, "__class__", Shifted) for m in x.modules() if type(m) is FrozenNorm], "Shifted is not"),
        (lambda x: x.update({"layer1": Stochastic(*x["layer1"])}), "layer1 is a tests.test_idea_backbone.Stochastic"),
        (lambda x: x.update({"relu": nn.SiLU()}), "relu is SiLU"),
        (lambda x: x.return_layers.update({"maxpool": "stem"}), "features of maxpool, too"),
        (lambda x: x["conv1"].register_forward_hook(lambda *_: None), "conv1 has a hook"),
        (lambda x: setattr(x, "forward", x.forward), "patched"),
    ):
        module = body()
        change(module)
        with pytest.raises(ValueError, match=reason):
            dab_fast.accelerate(module)


def test_changes_after_accelerate():
    for change, reason in (
        (lambda x: x["layer1"][0].conv1.register_forward_hook(lambda *_: None), "has a hook"),
        (lambda x: setattr(x["layer1"][0].bn1, "eps", 0.03), "eps differ"),
        (lambda x: x["layer4"].register_forward_pre_hook(lambda m, given: (given[0] * 2,)), "has a hook"),
    ):
        theirs = body()
        ours = accelerated(theirs)
        with torch.no_grad():
            ours(IMAGES)
            change(theirs)
            change(ours)
            for name, x in theirs(IMAGES).items():
                assert torch.equal(ours(IMAGES)[name], x)
        assert reason in str(ours.dab_fast_reasons)


def test_return_layers_that_change_are_followed():
    theirs = body()
    ours = accelerated(theirs)
    for module in (ours, theirs):
        module.return_layers = {"layer2": "early", "layer4": "late"}
    with torch.no_grad():
        assert_same(ours, theirs)


def test_names_copies_and_restore():
    theirs = body()
    ours = accelerated(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        assert_same(copy.deepcopy(ours), theirs)
        dab_fast.restore(ours)
        assert type(ours) is type(theirs)
        assert torch.equal(ours(IMAGES)["0"], theirs(IMAGES)["0"])


@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile(grad):
    theirs = body()
    ours = accelerated(theirs)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES)["0"], theirs(IMAGES)["0"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["own", "torchvision"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision(name, norm):
    torchvision = pytest.importorskip("torchvision")
    kind = FrozenNorm if norm == "own" else torchvision.ops.misc.FrozenBatchNorm2d
    torch.manual_seed(0)
    dilation = [False, False, name == "resnet50"]
    network = getattr(torchvision.models, name)(replace_stride_with_dilation=dilation, norm_layer=kind)
    theirs = torchvision.models._utils.IntermediateLayerGetter(network, {"layer2": "0", "layer4": "1"}).eval()
    randomize_buffers(theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
        assert_same(accelerated(theirs), theirs)
