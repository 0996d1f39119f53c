"""The whole decoder on the Triton kernels, in the interpreter, against Hugging Face: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dab_fast import DabDecoder, measure, ops
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support.models import accelerated_copy, assert_same_gradients, huggingface_model, images, labels, perturb_

# 25 x 42 memory tokens after the tiny backbone's stride of 32.
FULL_SIZE = {"std": 0.03, "hidden_size": 256, "decoder_attention_heads": 8, "num_queries": 300, "decoder_layers": 6}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "config, size, padded",
    [
        ({"num_queries": 7}, (64, 96), False),
        ({"num_queries": 5, "num_patterns": 2, "keep_query_pos": True}, (96, 64), True),
        pytest.param(FULL_SIZE, (800, 1344), True, marks=pytest.mark.sweep),
    ],
    ids=["small", "padded_patterns", "full_size"],
)
def test_outputs_and_gradients(config, size, padded, device):
    model = huggingface_model(**config).train().to(device)
    fast = accelerated_copy(model, parts=("encoder", "decoder", "head", "criterion"))  # what has Triton kernels
    inputs = {name: x.to(device) for name, x in images(2, *size, padded=padded).items()}
    inputs["labels"] = [{name: x.to(device) for name, x in image.items()} for image in labels()]
    with ops.backend("triton"):
        counts = measure.count(lambda: fast.model(**inputs))
        ours = fast(**inputs)
        ours.loss.backward()
    theirs = model(**inputs)
    theirs.loss.backward()
    layers = model.config.decoder_layers
    assert counts.kernels.total() >= 3 * layers, "the kernels must have run, or the test shows nothing"
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=HIDDEN_TOLERANCE)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=BOX_TOLERANCE)
    assert_same_gradients(
        {name: p.grad for name, p in fast.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
    )


def test_recompute_keeps_the_backend():
    """Backward, where the layers run again, may come after another backend was chosen."""
    fast = accelerated_copy(huggingface_model(num_queries=5, decoder_layers=2).train(), recompute=True)
    with ops.backend("triton"):
        loss = fast(**images(1, 64, 64), labels=labels(1)).loss
    counts = measure.count(loss.backward)
    assert counts.kernels["forward_kernel"] >= 4


def test_compile_without_graph_breaks():
    model = DabDecoder(d_model=32, nhead=2, num_layers=2, dim_feedforward=48, attention_dropout=0.0)
    perturb_(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    params = dict(model.named_parameters())
    for b, q, s in ((2, 5, 12), (3, 7, 35)):
        inputs = torch.randn(b, q, 32), torch.randn(b, s, 32), torch.randn(b, s, 32), 0.3 * torch.randn(b, q, 4)
        gradients = []
        for decoder, backend in ((compiled, "triton"), (model, "torch")):
            with ops.backend(backend):
                out = decoder(*inputs)
                loss = out.hidden_states.sin().sum() + out.reference_points.sum()
                found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            gradients.append(dict(zip(params, found, strict=True)))
        assert_same_gradients(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_cuda_graph_of_a_training_step(backend, dropout):
    """Nothing waits for the host, and a replay reads the inputs, and draws the dropout, of its own time."""
    model = DabDecoder(d_model=64, nhead=2, num_layers=2, dim_feedforward=96, attention_dropout=dropout)
    perturb_(model)
    params = list(model.cuda().train().parameters())

    def draw() -> list[torch.Tensor]:
        return [torch.randn(2, n, width, device="cuda") for n, width in ((9, 64), (35, 64), (35, 64), (9, 4))]

    static = draw()

    def step() -> list[torch.Tensor]:
        out = model(*static)
        loss = out.hidden_states.sin().sum() + out.reference_points.sum()
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        return [loss.detach(), *(x for x in gradients if x is not None)]

    with ops.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for x, fresh in zip(static, draw(), strict=True):
            x.copy_(fresh)
        expected = step()
    graph.replay()
    first = [x.clone() for x in captured]
    graph.replay()
    assert all(x.isfinite().all() for x in first)
    if dropout:
        assert not torch.equal(first[0], captured[0])
        return
    for once, again, eager in zip(first, captured, expected, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())
