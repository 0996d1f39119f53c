"""A Hugging Face model and its accelerated copy part by part: the calls, the time and the difference of each.

Each part is called with what its own model gives it; the peers are what else a user could run the whole model with.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dab_fast import measure

# The convolutions, and not the positions beside them, whose module an accelerated model looks at.
MODULES = {"backbone": "model.backbone.conv_encoder", "encoder": "model.encoder", "decoder": "model.decoder"}
MODEL, STEP = "whole model", "training step"


@dataclass(frozen=True)
class Pair:
    """The same figure of both models."""

    original: float
    accelerated: float

    @property
    def ratio(self) -> float:
        return self.original / self.accelerated


@dataclass(frozen=True)
class Part:
    """What one part of a model costs."""

    ms: Pair  # medians of calls in turn
    aten_calls: Pair
    own_kernels: Pair  # launches of this package's kernels, which are no ATen calls
    difference: float  # the largest, of what both give, in units of the original's largest


@dataclass(frozen=True)
class Peer:
    """Another way to run the whole original model."""

    ms: float
    max_box_difference: float  # from the original's, in boxes in [0, 1]


@dataclass(frozen=True)
class Call:
    """A call of a module with the arguments that the model around it gives it."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self) -> Any:
        return self.module(*self.arguments, **self.keywords)


def run_and_catch(model: Any, pixel_values: Tensor) -> tuple[Any, dict[str, Call]]:
    """The model's outputs, and the calls of its parts that happened inside."""
    caught: dict[str, Call] = {}

    def catching(part: str, kind: type[nn.Module]) -> Any:
        forward = kind.forward

        def catch(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            caught[part] = Call(module, arguments, keywords)
            return forward(module, *arguments, **keywords)

        return mock.patch.object(kind, "forward", catch)

    # Not by a hook: the fast model gives a part that somebody looks at the original's arguments, without shortcuts.
    with ExitStack() as stack:
        for part, name in MODULES.items():
            stack.enter_context(catching(part, type(model.get_submodule(name))))
        outputs = model(pixel_values)
    return outputs, caught


def compare(
    original: Any,
    accelerated: Any,
    calls: dict[str, tuple[Call, Call]],  # of both models, by part
    pixel_values: Tensor,  # [1, 3, height, width]
    peers: dict[str, Callable[[Tensor], Tensor]],  # of `peers`
) -> tuple[dict[str, Part], dict[str, Peer], dict[str, measure.Times]]:
    """The parts and the whole model, the peers, and every time that was taken, without gradients."""
    device = pixel_values.device
    both: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = dict(calls)
    both[MODEL] = lambda: original(pixel_values), lambda: accelerated(pixel_values)
    parts: dict[str, Part] = {}
    times: dict[str, measure.Times] = {}
    others = {name: functools.partial(run, pixel_values) for name, run in peers.items()}
    for part, pair in both.items():
        fns: dict[str, Callable[[], Any]] = dict(zip(("original", "accelerated"), pair, strict=True))
        if part == MODEL:
            fns |= others
        timed = measure.interleaved_times(fns, 11, warmup=int(part != MODEL), seconds=10, device=device)
        times |= {f"{part} {name}": t for name, t in timed.items()}
        parts[part] = _part(pair, timed)
    found = {}
    if others:
        boxes = original(pixel_values).pred_boxes
        for name, run in others.items():
            found[name] = Peer(1e3 * times[f"{MODEL} {name}"].quantile(0.5), (run() - boxes).abs().max().item())
    return parts, found, times


def _part(pair: tuple[Callable[[], Any], Callable[[], Any]], timed: dict[str, measure.Times]) -> Part:
    outputs: list[list[Tensor]] = []
    counts = [measure.count(lambda call=call: outputs.append(_tensors(call()))) for call in pair]  # type: ignore[misc]
    theirs, ours = outputs
    return Part(
        Pair(*(1e3 * timed[name].quantile(0.5) for name in ("original", "accelerated"))),
        Pair(*(c.aten.total() for c in counts)),
        Pair(*(c.kernels.total() for c in counts)),
        max(_difference(a, b) for a, b in zip(theirs, ours, strict=True)),
    )


def _tensors(outputs: Any) -> list[Tensor]:
    """Those of floating point, of a part's outputs or of a whole model's."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, (list, tuple)):
        return [x for part in outputs for x in _tensors(part)]
    if hasattr(outputs, "values"):
        return [x for part in outputs.values() for x in _tensors(part)]
    return []


def _difference(theirs: Tensor, ours: Tensor) -> float:
    """Of a model that computes only the last layer's boxes, say, the last of theirs."""
    theirs, ours = theirs.detach().double(), ours.detach().double()
    return ((theirs - ours).abs().max() / theirs.abs().max()).item()


def compare_steps(
    original: Any,
    accelerated: Any,
    pixel_values: Tensor,  # [B, 3, height, width]
    labels: list[dict[str, Tensor]],
) -> tuple[Part, dict[str, measure.Times]]:
    """Forward, loss and backward, with the dropout that training has; the difference is that of the loss without."""

    def losses(model: Any) -> Callable[[], Any]:
        return lambda: model(pixel_values, labels=labels).loss

    def step(model: Any) -> Callable[[], Any]:
        def run() -> None:
            model.zero_grad()
            losses(model)().backward()

        return run

    models = original, accelerated
    difference = _difference(*(losses(model)() for model in models))
    for model in models:
        model.train()
    try:
        calls = [step(model) for model in models]
        timed = measure.interleaved_times(
            dict(zip(("original", "accelerated"), calls, strict=True)), 5, seconds=15, device=pixel_values.device
        )
        counts = [measure.count(call) for call in calls]
    finally:
        for model in models:
            model.eval().zero_grad()
    return Part(
        Pair(*(1e3 * timed[name].quantile(0.5) for name in ("original", "accelerated"))),
        Pair(*(c.aten.total() for c in counts)),
        Pair(*(c.kernels.total() for c in counts)),
        difference,
    ), {f"{STEP} {name}": t for name, t in timed.items()}


class _Boxes(nn.Module):
    """A model of tensors, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).pred_boxes


@contextlib.contextmanager
def peers(model: Any, pixel_values: Tensor) -> Iterator[dict[str, Callable[[Tensor], Tensor]]]:
    """What else runs the whole original model here, by name: torch.compile, and on a CPU what is installed of ONNX
    Runtime and OpenVINO. Each gives the boxes [B, Q, 4]."""
    boxes = _Boxes(copy.deepcopy(model)).eval()
    found: dict[str, Callable[[Tensor], Tensor]] = {"torch.compile": torch.compile(boxes)}
    with tempfile.TemporaryDirectory() as folder:
        if pixel_values.device.type == "cpu" and importlib.util.find_spec("onnxruntime"):
            found["ONNX Runtime"] = _onnx_runtime(boxes, pixel_values, Path(folder) / "model.onnx")
        if pixel_values.device.type == "cpu" and importlib.util.find_spec("openvino"):
            found["OpenVINO"] = _openvino(boxes, pixel_values)
        for run in found.values():
            run(pixel_values)
        yield found


def _onnx_runtime(boxes: nn.Module, pixel_values: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    torch.onnx.export(boxes, (pixel_values,), str(path), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(boxes: nn.Module, pixel_values: Tensor) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(openvino.convert_model(boxes, example_input=pixel_values), "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])
