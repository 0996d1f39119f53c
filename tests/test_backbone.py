"""The backbone: a ResNet whose frozen norms are part of its convolutions, and what is folded is never stale."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DabDetrConfig, ResNetConfig
from transformers.models.dab_detr import modeling_dab_detr

import dab_fast
from dab_fast import measure
from dab_fast.parts import folding, onednn
from tests.support.models import assert_same_gradients, huggingface_model, images

# Of the largest feature: rounding of float32 through twenty convolutions stays below 1e-6 in every draw seen; one norm
# whose scale is left out changes features by more than a tenth.
TOLERANCE = 1e-5

BOTTLENECK = dict(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[2, 1, 2, 1], layer_type="bottleneck")
BASIC = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[2, 1, 1, 2], layer_type="basic")


def encoder(*, out: tuple[str, ...] = ("stage4",), dc5: bool = False, **config: Any) -> Any:
    """Hugging Face's backbone in eval mode, with buffers that hide nothing."""
    model = huggingface_model(backbone_config=ResNetConfig(**(config or BOTTLENECK), out_features=list(out)), std=0.03)
    module: Any = model.model.backbone.conv_encoder
    randomize_buffers(module)
    if dc5:  # transformers' own ResNet has no setting for it: what IDEA's dilated last stage does to its convolutions
        for conv in (x for x in module.model.encoder.stages[3].modules() if isinstance(x, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
    return module


def randomize_buffers(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, x in module.named_buffers():
        noise = torch.rand(x.shape, generator=generator) - 0.5
        x.copy_(noise + (1.0 if name.endswith(("running_var", "weight")) else 0.0))


def pair(**config: Any) -> tuple[Any, Any]:
    """The original, and an accelerated copy."""
    theirs = encoder(**config)
    ours = copy.deepcopy(theirs)
    report = dab_fast.accelerate(ours)
    assert list(report.replaced) == [""], report
    return ours, theirs


def pixels(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 64, 96] and their mask, padded where there are two."""
    given = images(batch, 64, 96, padded=batch > 1)
    return given["pixel_values"], given.get("pixel_mask", torch.ones(batch, 64, 96))


def assert_same(ours: Any, theirs: Any, *given: Tensor) -> None:
    """The fast forward gives what the original gives: values, masks and memory layout."""
    before = sum(ours.dab_fast_reasons.values())
    got, expected = ours(*given), theirs(*given)
    assert sum(ours.dab_fast_reasons.values()) == before, ours.dab_fast_reasons
    assert len(got) == len(expected)
    for (x, mask), (right, right_mask) in zip(got, expected, strict=True):
        assert_close(x, right)
        assert x.stride() == right.stride()
        assert torch.equal(mask, right_mask)


def assert_close(x: Tensor, right: Tensor) -> None:
    assert x.dtype == right.dtype
    torch.testing.assert_close(x, right, rtol=0, atol=TOLERANCE * right.abs().max().item())


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


# What is folded is never stale


def _data_copy(module: nn.Module) -> None:
    for p in module.parameters():
        p.data.copy_(p.data * 1.5)


def _data_swap(module: nn.Module) -> None:
    """The same numbers in another order."""
    for p in module.parameters():
        p.data.copy_(p.data.flip(0).clone())


def _one_bit(module: nn.Module) -> None:
    weight = next(p for name, p in module.named_parameters() if "stages.3" in name).data
    weight.view(torch.int32).view(-1)[7] ^= 1 << 29


def _replaced(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 0.5


def _buffers(module: nn.Module) -> None:
    for name, x in module.named_buffers():
        if name.endswith("running_var"):
            x.mul_(2.0)


def _buffers_data(module: nn.Module) -> None:
    for name, x in module.named_buffers():
        if name.endswith("running_mean"):
            x.data.add_(1.0)


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({name: x * 0.7 for name, x in module.state_dict().items()})


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({name: x * 0.7 for name, x in module.state_dict().items()}, assign=True)


def _stepped(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    with torch.enable_grad():
        module(*pixels())[0][0].square().mean().backward()
    optimizer.step()


def _inference_write(module: nn.Module) -> None:
    with torch.inference_mode():
        for p in module.parameters():
            p.mul_(0.9)


CHANGES = [
    _data_copy,
    _data_swap,
    _one_bit,
    _replaced,
    _buffers,
    _buffers_data,
    _loaded,
    _assigned,
    _stepped,
    _inference_write,
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_never_stale(change: Callable[[nn.Module], None], grad: bool):
    ours, theirs = pair()
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            before = ours(*pixels())[0][0]
        for module in (ours, theirs):
            with torch.no_grad():
                change(module)
        assert not torch.equal(before, theirs(*pixels())[0][0])
        for _ in range(3):
            assert_same(ours, theirs, *pixels())


def test_rows_that_change_places_are_seen():
    """Of a tensor so large that its bits are added up."""
    x, owner = torch.randn(128, 512), nn.Identity()
    first = folding.derived(owner, "it", [x], x.clone)
    assert folding.derived(owner, "it", [x], x.clone) is first
    x.data[:2] = x.data[:2].flip(0).clone()
    assert torch.equal(folding.derived(owner, "it", [x], x.clone), x)


def test_ema():
    ours, theirs = pair()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in (ours, theirs)]
    for _ in range(3):
        for module, average in zip((ours, theirs), averages, strict=True):
            _stepped(module)
            average.update_parameters(module)
        with torch.no_grad():
            for (x, _), (right, _) in zip(averages[0](*pixels()), averages[1](*pixels()), strict=True):
                # Two trained networks: optimizers divide by gradients, whose rounding then shows.
                torch.testing.assert_close(x, right, rtol=0, atol=1e-2 * right.abs().max().item())
            plain = copy.deepcopy(averages[0].module)
            dab_fast.restore(plain)
            assert_same(averages[0].module, plain, *pixels())


def test_functional_call():
    ours, theirs = pair()
    other = {name: x * 0.8 for name, x in theirs.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            assert_same(ours, theirs, *pixels())
            got = torch.func.functional_call(ours, other, pixels())[0][0]
            assert_close(got, torch.func.functional_call(theirs, other, pixels())[0][0])


def test_inference_mode():
    with torch.inference_mode():
        ours, theirs = pair()  # of tensors that have no version
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
        for module in (ours, theirs):
            for p in module.parameters():
                p.mul_(0.9)
        assert_same(ours, theirs, *pixels())
    ours, theirs = pair()
    with torch.inference_mode():
        assert_same(ours, theirs, *pixels())
    for module in (ours, theirs):
        module(*pixels())[0][0].sum().backward()  # nothing that was kept is a tensor of inference mode
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs)))


def test_threads():
    ours, theirs = pair()
    given = [(torch.randn(1, 3, size, 64), torch.ones(1, size, 64)) for size in (32, 64, 96, 64)]
    with torch.no_grad():
        expected = [theirs(*x)[0][0] for x in given]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_close(ours(*given[i])[0][0], expected[i])
                    dab_fast.refresh(ours)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_on_a_gpu_the_answer_comes_at_the_next_call(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A GPU's answer stands in a flag that the next call reads; here the flag is the CPU's."""
    monkeypatch.setattr(folding, "_waits_for", lambda device: False)
    monkeypatch.setattr(folding, "_is_capturing", lambda device: False)
    monkeypatch.setattr(folding, "_later", lambda flag: lambda: bool(flag))
    monkeypatch.setattr(folding, "_warned", False)
    ours, theirs = pair()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "dab_fast"):
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
        for module in (ours, theirs):
            _data_copy(module)
        ours(*pixels())
        assert "dab_fast.refresh" not in caplog.text
        assert_same(ours, theirs, *pixels())
        assert caplog.text.count("dab_fast.refresh") == 1
        for module in (ours, theirs):
            _data_copy(module)
        dab_fast.refresh(ours)
        assert_same(ours, theirs, *pixels())
        assert caplog.text.count("dab_fast.refresh") == 1


# What an accelerated backbone leaves as it was


def test_nothing_folded_is_copied_saved_or_kept_too_long():
    ours, theirs = pair()
    with torch.no_grad():
        ours(*pixels())
    assert folding.kept(ours).nbytes() > 0
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert folding.kept(copy.deepcopy(ours)) is None
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded) is type(theirs)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert len(buffer.getvalue()) < 1.1 * sum(x.nbytes for x in ours.state_dict().values()) + 200_000
    for leave in (lambda: ours.train().eval(), lambda: ours.to(torch.float32), lambda: dab_fast.refresh(ours)):
        with torch.no_grad():
            ours(*pixels())
        leave()
        assert folding.kept(ours) is None
    with torch.no_grad():
        ours(*pixels())
    dab_fast.restore(ours)
    assert folding.kept(ours) is None
    assert type(ours) is type(theirs)
    assert torch.equal(ours(*pixels())[0][0], theirs(*pixels())[0][0])


def test_the_report_says_how_much_memory_is_kept():
    ours = encoder()
    report = dab_fast.accelerate(ours)
    assert "folded" not in str(report)
    with torch.no_grad():
        ours(*pixels())
    assert "MB of folded weights" in str(report)


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
    for module in (ours, theirs):  # in float64: float32's rounding turns relus of a deep random network over
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
