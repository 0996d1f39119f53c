"""Exported models: docs/exports.md, row by row. Every parameter is perturbed, so that boxes move.

An export is made of one batch and size, and asked for others. The sweep exports the original too: where it cannot be
exported, the document says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dab_fast import DabDecoder
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support import idea_models
from tests.support.models import accelerated_copy, huggingface_model, images
from tests.test_decoder import arguments, decoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Tensors = tuple[Tensor, ...]
Axes = Sequence[Sequence[int]]  # of every input, those that change
Exported = Callable[..., Sequence[Any]]

# A shape check reads sizes, which a trace then takes for constants of the check, not of the graph.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def torch_export(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    torch.export.save(_program(model, example, axes), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def _program(model: nn.Module, example: Tensors, axes: Axes) -> torch.export.ExportedProgram:
    dynamic = tuple(dict.fromkeys(some, torch.export.Dim.AUTO) for some in axes)
    return torch.export.export(model, example, dynamic_shapes=(dynamic,))


def aot_inductor(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    program = _program(model, example, axes)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(path)


def jit_trace(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def onnx_dynamo(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    dynamic = tuple(dict.fromkeys(some, torch.export.Dim.AUTO) for some in axes)
    path = folder / "model.onnx"
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    return _onnx_session(runtime, path)


def onnx_legacy(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    names = [f"input{i}" for i in range(len(example))]
    dynamic = {name: {axis: f"{name}_{axis}" for axis in some} for name, some in zip(names, axes, strict=True)}
    path = folder / "model.onnx"
    torch.onnx.export(model, example, path, dynamo=False, input_names=names, dynamic_axes=dynamic)
    return _onnx_session(runtime, path)


def _onnx_session(runtime: Any, path: Path) -> Exported:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return lambda *inputs: session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def openvino(model: nn.Module, example: Tensors, axes: Axes, folder: Path) -> Exported:
    openvino = pytest.importorskip("openvino")
    converted = openvino.convert_model(model, example_input=example)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return lambda *inputs: list(compiled([x.numpy() for x in inputs]).values())


class Detector(nn.Module):
    """A Hugging Face model with tensors in and tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensors:
        out = self.model(*inputs)
        return out.logits, out.pred_boxes


class Decoder(nn.Module):
    """A decoder whose last input is the padding mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensors:
        *inputs, mask = inputs
        if isinstance(self.model, DabDecoder):
            return tuple(self.model(*inputs, memory_key_padding_mask=mask))
        content, memory, pos, anchors = (x.transpose(0, 1) for x in inputs)
        given = {"memory_key_padding_mask": mask, "pos": pos, "refpoints_unsigmoid": anchors}
        return tuple(self.model(content, memory, **given))


def detector() -> nn.Module:
    return Detector(huggingface_model())


def detector_inputs(b: int, h: int, w: int) -> Tensors:
    return tuple(images(b, 32 * h, 32 * w).values())


def padded_detector_inputs(b: int, h: int, w: int) -> Tensors:
    return tuple(images(b, 32 * h, 32 * w, padded=True).values())


def dab_decoder(num_layers: int) -> nn.Module:
    return Decoder(decoder(num_layers=num_layers).eval())


def decoder_inputs(b: int, h: int, w: int) -> Tensors:
    mask = torch.arange(h * w).expand(b, -1) >= h * w - torch.arange(b)[:, None]
    return (*arguments(decoder().config, b, 5, h * w), mask)


DETECTOR_AXES = ((0, 2, 3), (0, 1, 2))
DECODER_AXES = ((0,), (0, 1), (0, 1), (0,), (0, 1))

# The original, how it becomes ours, its inputs for a batch and a feature map, and which of their axes change.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], Callable[..., Tensors], Axes]] = {
    "huggingface": (detector, accelerated_copy, detector_inputs, DETECTOR_AXES[:1]),
    "huggingface_padded": (detector, accelerated_copy, padded_detector_inputs, DETECTOR_AXES),
    "idea_research": (lambda: Decoder(idea_models.oracle()), accelerated_copy, decoder_inputs, DECODER_AXES),
    "dab_decoder": (lambda: dab_decoder(3), lambda model: model, decoder_inputs, DECODER_AXES),
    "one_layer": (lambda: dab_decoder(1), lambda model: model, decoder_inputs, DECODER_AXES),
}
KINDS = {
    "torch.export": torch_export,
    "onnx dynamo": onnx_dynamo,
    "onnx legacy": onnx_legacy,
    "openvino": openvino,
    "jit.trace": jit_trace,
    "aot_inductor": aot_inductor,
}
# Of the slow kinds one model is always exported.
SLOW = {
    "torch.export": "huggingface_padded",
    "onnx dynamo": "dab_decoder",
    "openvino": "huggingface_padded",
    "aot_inductor": "one_layer",
}


def case(kind: str, model: str) -> Any:
    return pytest.param(kind, model, marks=pytest.mark.sweep if SLOW.get(kind, model) != model else ())


def check(exported: Exported, original: nn.Module, inputs: Callable[..., Tensors]) -> None:
    for shape in ((2, 2, 3), (1, 3, 2), (3, 4, 5)):  # B and the feature map
        x = inputs(*shape)
        with torch.no_grad():
            hidden, boxes = (torch.as_tensor(y) for y in exported(*x))
            their_hidden, their_boxes = original(*x)
        torch.testing.assert_close(hidden, their_hidden, rtol=0, atol=HIDDEN_TOLERANCE)
        torch.testing.assert_close(boxes, their_boxes, rtol=0, atol=BOX_TOLERANCE)


@pytest.mark.parametrize("kind, model", [case(kind, model) for kind in KINDS for model in MODELS])
def test_accelerated(kind, model, tmp_path):
    make, accelerated, inputs, axes = MODELS[model]
    original = make()
    with torch.no_grad():
        exported = KINDS[kind](accelerated(original), inputs(2, 2, 3), axes, tmp_path)
    check(exported, original, inputs)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["huggingface", "huggingface_padded"])
def test_original(kind, model, tmp_path):
    """What the document says of it."""
    make, _, inputs, axes = MODELS[model]
    original = make()
    with torch.no_grad():
        exported = KINDS[kind](original, inputs(2, 2, 3), axes, tmp_path)
    check(exported, original, inputs)


@pytest.mark.parametrize("kind", ["onnx legacy", "jit.trace"])
def test_made_with_gradients(kind, tmp_path):
    """Autograd Functions of this package would tie the file to it, or refuse to be saved."""
    make, accelerated, inputs, axes = MODELS["huggingface"]
    original = make()
    check(KINDS[kind](accelerated(original), inputs(2, 2, 3), axes, tmp_path), original, inputs)


@pytest.mark.parametrize("model", [model for model in MODELS if model != "one_layer"])
def test_boxes_move(model):
    """Else the exports of a model that refines nothing would pass."""
    make, _, inputs, _ = MODELS[model]
    with torch.no_grad():
        boxes = [make()(*inputs(2, h, w))[1] for h, w in ((2, 3), (4, 5))]
    assert (boxes[0] - boxes[1]).abs().max() > 1e-3
