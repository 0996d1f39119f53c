"""The whole model on a GPU, as users run it there: without waits, in a CUDA graph, on the second device, on two."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dab_fast
from tests.support.models import assert_same_gradients, huggingface_model, images, labels

pytestmark = pytest.mark.gpu
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")


def on(device: str, x: Any) -> Any:
    if isinstance(x, list):
        return [on(device, each) for each in x]
    return {name: each.to(device) for name, each in x.items()}


def model_and_twin(device: str = "cuda") -> tuple[Any, Any]:
    model = huggingface_model().to(device)
    fast = copy.deepcopy(model)
    dab_fast.accelerate(fast)
    return model, fast


def assert_same_boxes(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=1e-5)
    assert ours.pred_boxes.is_cuda


@contextmanager
def waits():
    """A list of where the host waits for the GPU in this block."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("padded", [False, True])
def test_the_forward_never_waits(padded: bool):
    model, fast = model_and_twin()
    inputs = on("cuda", images(padded=padded))
    with torch.no_grad():
        fast(**inputs)
        with waits() as found:
            ours = fast(**inputs)
        with waits() as theirs:
            expected = model(**inputs)
    assert_same_boxes(ours, expected)
    assert theirs and not found, "the original waits for its masks"


def test_a_training_step_waits_once_for_the_costs():
    _, fast = model_and_twin()
    inputs, target = on("cuda", images()), on("cuda", labels())

    def step() -> None:
        fast.train()(**inputs, labels=target).loss.backward()

    step()
    with waits() as found:
        step()
    assert len(found) == 1 and "matching.py" in found[0], found


def test_a_graph_of_the_forward():
    model, fast = model_and_twin()
    given = on("cuda", images())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                fast(**given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            ours = fast(**given)
        given["pixel_values"].copy_(torch.randn_like(given["pixel_values"]))
        graph.replay()
        assert_same_boxes(ours, model(**given))


@two_devices
def test_the_second_device_is_used_while_the_first_is_current():
    model, fast = model_and_twin("cuda:1")
    inputs, target = on("cuda:1", images(padded=True)), on("cuda:1", labels())
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        assert_same_boxes(fast(**inputs), model(**inputs))
    fast.train()(**inputs, labels=target).loss.backward()
    assert {p.grad.get_device() for p in fast.parameters() if p.grad is not None} == {1}


@two_devices
def test_a_model_moves_to_the_other_device():
    model, fast = model_and_twin()
    with torch.no_grad():
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            inputs = on(device, images())
            assert_same_boxes(fast.to(device)(**inputs), model.to(device)(**inputs))


class Boxes(nn.Module):
    """DataParallel gathers tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask).pred_boxes


@two_devices
@pytest.mark.usefixtures("float64")
def test_data_parallel():
    gradients = []
    inputs = on("cuda", images())
    mask = torch.ones_like(inputs["pixel_values"][:, 0], dtype=torch.long)
    for m in model_and_twin():
        boxes = nn.DataParallel(Boxes(m), [0, 1])(inputs["pixel_values"], mask)
        boxes.square().sum().backward()
        gradients.append({"boxes": boxes} | {name: p.grad for name, p in m.named_parameters()})
    assert_same_gradients(*reversed(gradients))
