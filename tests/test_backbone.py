"""The backbone: a ResNet whose frozen norms are part of its convolutions."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DabDetrConfig, ResNetConfig
from transformers.models.dab_detr import modeling_dab_detr

import dab_fast
from dab_fast import measure
from dab_fast.parts import onednn
from tests.support.backbone import (
    BASIC,
    BOTTLENECK,
    assert_close,
    assert_same,
    pair,
    pixels,
    randomize_buffers,
)
from tests.support.models import assert_same_gradients, huggingface_model, images


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "config",
    [BOTTLENECK, BASIC, BOTTLENECK | {"downsample_in_bottleneck": True, "downsample_in_first_stage": True}],
    ids=["bottleneck", "basic", "downsampled"],
)
@pytest.mark.parametrize("dc5", [False, True])
def test_feature_maps(config: dict[str, Any], batch: int, grad: bool, dc5: bool):
    ours, theirs = pair(dc5=dc5, out=("stem", "stage1", "stage2", "stage4"), **config)
    with torch.set_grad_enabled(grad):
        for _ in range(3):  # the third with weights that oneDNN reordered
            assert_same(ours, theirs, *pixels(batch))


@pytest.mark.parametrize("images_last, weights_last", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("grad", [False, True])
def test_memory_layout_is_the_originals(images_last: bool, weights_last: bool, grad: bool):
    ours, theirs = pair(out=("stem", "stage1", "stage4"), **BASIC)  # whose first block adds the stem's result
    x, mask = pixels()
    if images_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if weights_last:
        ours, theirs = (module.to(memory_format=torch.channels_last) for module in (ours, theirs))
    with torch.set_grad_enabled(grad):
        assert_same(ours, theirs, x, mask)
        assert_same(ours, theirs, x, mask)


def test_other_sizes_follow_one_another():
    ours, theirs = pair()
    with torch.no_grad():
        for height, width in ((64, 96), (64, 96), (33, 70), (64, 96), (33, 70), (33, 70), (200, 65)):
            assert_same(ours, theirs, torch.randn(1, 3, height, width), torch.ones(1, height, width))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(training: bool, frozen: bool):
    """`frozen`: a saliency map, whose input alone requires a gradient."""
    ours, theirs = pair()
    x, mask = pixels()
    gradients = []
    for module in (ours, theirs):
        module.train(training).requires_grad_(not frozen)
        given = x.clone().requires_grad_()
        feature_map, _ = module(given, mask)[0]
        (feature_map * torch.linspace(-1, 1, feature_map.numel()).view_as(feature_map)).sum().backward()
        gradients.append({"images": given.grad} | {name: p.grad for name, p in module.named_parameters()})
    assert_same_gradients(*gradients)
    assert not ours.dab_fast_reasons


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights_last", [False, True])
def test_gradients_come_with_the_strides_of_the_originals(autocast: bool, weights_last: bool):
    """What DistributedDataParallel's buckets see, before `.grad` is made the parameter's."""
    strides: list[dict[str, tuple[int, ...]]] = []
    for module in pair():
        module.to(memory_format=torch.channels_last if weights_last else torch.contiguous_format)
        strides.append(of := {})
        for name, p in module.named_parameters():
            p.register_hook(lambda gradient, of=of, name=name: of.__setitem__(name, gradient.stride()))
        with torch.autocast("cpu", enabled=autocast):
            feature_map, _ = module(*pixels())[0]
        feature_map.float().square().mean().backward()
    assert strides[0] == strides[1]


class ConvolutionGradients(TorchDispatchMode):
    """The arguments of every convolution's backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            self.calls.append(args)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("autocast", [False, True])
def test_no_gradient_that_onednn_writes_past_its_memory(autocast: bool):
    """Channels last, a 1x1 convolution with a stride whose input is narrower than oneDNN's block of channels."""
    ours, theirs = pair(**BASIC)
    assert any(x.kernel_size == (1, 1) and x.stride == (2, 2) for x in theirs.modules() if isinstance(x, nn.Conv2d))
    with ConvolutionGradients() as gradients:
        with torch.autocast("cpu", enabled=autocast):
            feature_map, _ = ours(*pixels())[0]
        feature_map.float().square().mean().backward()
    assert len(gradients.calls) == sum(isinstance(x, nn.Conv2d) for x in theirs.modules())
    for _, _, weight, _, stride, *_ in gradients.calls:
        assert weight.shape[2:] != (1, 1) or weight.shape[1] >= 16 or list(stride) == [1, 1]


@pytest.mark.usefixtures("float64")
def test_only_the_first_stages_are_frozen():
    ours, theirs = pair()
    gradients = []
    for module in (ours, theirs):
        for name, p in module.named_parameters():
            p.requires_grad_("stages.2" in name or "stages.3" in name)
        module(*pixels())[0][0].square().mean().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    assert_same_gradients(*gradients)


def test_a_second_derivative_raises():
    ours, _ = pair()
    x, mask = pixels()
    (d_x,) = torch.autograd.grad(ours(x.requires_grad_(), mask)[0][0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="restore"):
        d_x.square().sum().backward()


def test_backward_keeps_no_more_than_the_originals():
    ours, theirs = pair()
    kept = [measure.saved_bytes(lambda m=m: m(*pixels()), exclude=m.parameters()) for m in (ours, theirs)]
    assert kept[0] <= kept[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_as_near_to_float64_as_the_original(dtype: torch.dtype):
    ours, theirs = (module.to(dtype) for module in pair())
    x, mask = pixels()
    x = x.to(dtype)
    with torch.no_grad():
        right = copy.deepcopy(theirs).double()(x.double(), mask)[0][0]
        got, expected = (module(x, mask)[0][0] for module in (ours, theirs))
    assert got.dtype == dtype
    floor = 1e-12 * right.norm()  # of float64, where both are right
    assert (got.double() - right).norm() <= 1.1 * (expected.double() - right).norm() + floor
    assert not ours.dab_fast_reasons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_as_near_to_float64_as_the_original(dtype: torch.dtype, grad: bool):
    ours, theirs = pair()
    x, mask = pixels()
    with torch.no_grad():
        right = copy.deepcopy(theirs).double()(x.double(), mask)[0][0]
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
        got, expected = (module(x, mask)[0][0] for module in (ours, theirs))
    assert got.dtype == expected.dtype == torch.float32  # the norms promote, and so does the sum of a block
    assert (got.double() - right).norm() <= 1.1 * (expected.double() - right).norm()
    assert not ours.dab_fast_reasons


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_an_image_stays(value: float, grad: bool):
    ours, theirs = pair()
    x, mask = pixels()
    x[0, 1, 20, 30] = value
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            got, expected = (module(x, mask)[0][0] for module in (ours, theirs))
            assert got[0].isnan().any()
            assert torch.equal(got.isnan(), expected.isnan())
            assert_close(got[1], expected[1])


@pytest.mark.parametrize(
    "name", ["stages.0.layers.0.layer.0", "stages.3.layers.0.layer.2", "stages.1.layers.0.shortcut"]
)
def test_a_weight_that_is_nan_stays(name: str):
    ours, theirs = pair()
    with torch.no_grad():
        for module in (ours, theirs):
            module.get_submodule(f"model.encoder.{name}.convolution").weight[1, 2, 0, 0] = torch.nan
        for _ in range(3):
            got, expected = (module(*pixels())[0][0] for module in (ours, theirs))
            assert got.isnan().any()
            assert torch.equal(got.isnan(), expected.isnan())


# What an accelerated backbone leaves as it was


def test_a_hook_on_a_convolution_runs():
    ours, theirs = pair()
    conv = ours.model.encoder.stages[1].layers[0].layer[0].convolution
    calls: list[Tensor] = []
    handle = conv.register_forward_hook(lambda module, given, result: calls.append(result))
    with torch.no_grad():
        assert torch.equal(ours(*pixels())[0][0], theirs(*pixels())[0][0])
        assert len(calls) == 1
        assert any("hook" in reason for reason in ours.dab_fast_reasons)
        handle.remove()
        assert_same(ours, theirs, *pixels())


def _patched(ours: Any) -> None:
    conv = ours.model.encoder.stages[0].layers[0].layer[0].convolution
    conv._conv_forward = lambda x, weight, bias: torch.zeros(())


def _with_bias(ours: Any) -> None:
    conv = ours.model.encoder.stages[0].layers[0].layer[0].convolution
    conv.bias = nn.Parameter(torch.ones(conv.out_channels))


def _other_activation(ours: Any) -> None:
    ours.model.encoder.stages[0].layers[0].activation = nn.GELU()


def _thawed(ours: Any) -> None:
    ours.model.embedder.embedder.normalization = nn.BatchNorm2d(8)


def _reflecting(ours: Any) -> None:
    ours.model.encoder.stages[0].layers[0].layer[1].convolution.padding_mode = "reflect"


@pytest.mark.parametrize("change", [_patched, _with_bias, _other_activation, _thawed, _reflecting])
def test_what_it_does_not_know_takes_the_original_forward(change: Callable[[Any], None]):
    ours, _ = pair()
    change(ours)
    dab_fast_reasons = ours.dab_fast_reasons
    with torch.no_grad(), contextlib.suppress(RuntimeError, AttributeError):  # which the original raises, too
        ours(*pixels())
    assert sum(dab_fast_reasons.values()) == 1, dab_fast_reasons


def test_a_changed_stride_is_followed():
    ours, theirs = pair()
    with torch.no_grad():
        assert_same(ours, theirs, *pixels())
        for module in (ours, theirs):
            layer = module.model.encoder.stages[3].layers[0]
            layer.layer[1].convolution.stride = layer.shortcut.convolution.stride = (1, 1)
        assert_same(ours, theirs, *pixels())


def test_another_backbone_is_left_and_the_report_says_so():
    from transformers import ConvNextConfig

    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])
    model = huggingface_model(backbone_config=config)
    theirs = copy.deepcopy(model)
    report = dab_fast.accelerate(model)
    assert "model.backbone.conv_encoder" not in report.replaced
    assert "ConvNext" in report.not_replaced["model.backbone.conv_encoder"]
    with torch.no_grad():
        torch.testing.assert_close(model(**images()).pred_boxes, theirs(**images()).pred_boxes, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("dc5", [False, True])
def test_timm(name: str, dc5: bool):
    pytest.importorskip("timm")
    config = DabDetrConfig(use_timm_backbone=True, use_pretrained_backbone=False, backbone=name, dilation=dc5)
    theirs: Any = modeling_dab_detr.DabDetrConvEncoder(config).eval()
    randomize_buffers(theirs)
    ours: Any = copy.deepcopy(theirs)
    assert list(dab_fast.accelerate(ours).replaced) == [""]
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
    x, mask = pixels()
    for module in (ours, theirs):  # in float64, as the fixture of that name says
        module.double().train()(x.double(), mask)[-1][0].square().mean().backward()
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs)))
    assert not ours.dab_fast_reasons


def test_another_timm_network_is_left():
    pytest.importorskip("timm")
    config = DabDetrConfig(use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet18d")
    with pytest.raises(ValueError, match="its backbone is a timm"):
        dab_fast.accelerate(modeling_dab_detr.DabDetrConvEncoder(config))


def test_errors_are_the_originals():
    ours, theirs = pair()
    for x in (torch.randn(1, 4, 64, 64), torch.randn(3, 64, 64), torch.randn(1, 3, 64, 64).double()):
        messages = []
        for module in (ours, theirs):
            with pytest.raises((ValueError, RuntimeError)) as error, torch.no_grad():
                module(x, torch.ones(1, 64, 64))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_torch_func_takes_the_original_forward():
    ours, theirs = pair()
    x, mask = pixels()
    got, expected = (torch.func.vmap(lambda x, m=m: m(x[None], mask[:1])[0][0])(x) for m in (ours, theirs))
    assert_close(got, expected)
    assert ours.dab_fast_reasons


@pytest.mark.parametrize("grad", [False, True])
def test_torch_compile(grad: bool):
    ours, theirs = pair(**BASIC)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        assert_close(compiled(*pixels())[0][0], theirs(*pixels())[0][0])


def test_torch_export():
    ours, theirs = pair(**BASIC)
    program = torch.export.export(ours, pixels())
    assert_close(program.module()(*pixels())[0][0], theirs(*pixels())[0][0])


@pytest.mark.parametrize("private", [False, True])
def test_fewer_calls(private: bool, monkeypatch: pytest.MonkeyPatch):
    """One call per convolution, relu and sum; nine per norm are gone. With oneDNN's convolutions no sums either."""
    if not private:
        monkeypatch.setattr(onednn, "_works", lambda: False)
    elif not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    ours, theirs = pair()
    with torch.no_grad():
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
        with torch.profiler.profile() as profile:
            ours(*pixels())
        calls = Counter(event.name for event in profile.events())
        assert calls["aten::relu_"] == 1 + 3 * 6  # of the stem, and of six blocks
        assert calls["aten::add_"] == (0 if private else 6)
        assert calls["mkldnn::_convolution_pointwise_"] == (6 if private else 0)
        assert calls["aten::conv2d"] == (0 if private else 1 + 3 * 6 + 4)


def test_what_watches_the_calls_sees_plain_convolutions():
    """A mode that counts operations knows them, and may ask every tensor for its memory."""
    ours, _ = pair()
    with torch.no_grad():
        for _ in range(3):
            ours(*pixels())
        counts = measure.count(lambda: ours(*pixels())).aten
        assert counts["aten.convolution"] == 1 + 3 * 6 + 4
        assert not any(name.startswith("mkldnn") for name in counts)
        assert measure.peak_bytes(lambda: ours(*pixels())) > 0


def test_the_fallback_of_the_private_operators_is_probed(monkeypatch: pytest.MonkeyPatch):
    assert onednn._has_schemas()
    monkeypatch.setitem(onednn._SCHEMAS, ("_convolution_pointwise", "default"), "Tensor X")
    assert not onednn._has_schemas()


def test_the_whole_model_is_the_originals():
    theirs = huggingface_model(backbone_config=ResNetConfig(**BOTTLENECK, out_features=["stage4"]))
    ours = copy.deepcopy(theirs)
    report = dab_fast.accelerate(ours, parts=("backbone",))
    assert list(report.replaced) == ["model.backbone.conv_encoder"]
    with torch.no_grad():
        for padded in (False, True):
            got, expected = (m(**images(2, 64, 96, padded=padded)).pred_boxes for m in (ours, theirs))
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
