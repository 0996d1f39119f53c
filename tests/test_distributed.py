"""Accelerated models under DDP and FSDP, one gloo process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import accelerated_copy, assert_same_gradients, huggingface_model, images, labels


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model) -> dict[str, torch.Tensor | None]:
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
    return {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}


@pytest.mark.usefixtures("float64")
def test_ddp(process_group):
    model = huggingface_model().train()
    fast = accelerated_copy(model)
    parallel = DistributedDataParallel(fast)
    for m in (model, parallel):
        m(**images(), labels=labels()).loss.backward()
    assert_same_gradients(gradients(parallel), gradients(model))
    assert not fast.model.decoder.dab_fast_reasons


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("per_layer", [False, True])
def test_fsdp2(process_group, per_layer):
    """Sharded at the root the decoder reads whole parameters; layers sharded on their own are hooked: step aside."""
    model = huggingface_model().train()
    fast = accelerated_copy(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    if per_layer:
        for layer in fast.model.decoder.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(fast, mesh=mesh)
    for m in (model, fast):
        m(**images(), labels=labels()).loss.backward()
    assert_same_gradients(gradients(fast), gradients(model))
    assert bool(fast.model.decoder.dab_fast_reasons) == per_layer
