"""warmup runs every kernel, with every set of constants, that a decoder of the given shapes does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import dab_fast
from dab_fast import ops

CONFIG = dab_fast.DecoderConfig(d_model=32, nhead=2, num_layers=3, dim_feedforward=32)
B, Q, S = 2, 7, 12


def kernels(function) -> set:
    """The kernels that function launches, with what a compilation depends on."""
    found = set()
    original = InterpretedFunction.run

    def run(self, *args, **kwargs):
        given = [x.dtype if isinstance(x, torch.Tensor) else x is None for x in args]
        constants = {name: x for name, x in kwargs.items() if name not in ("grid", "warmup")}
        found.add(f"{self.__name__} {given} {sorted(constants.items())}")
        return original(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", run):
        function()
    return found


@pytest.mark.parametrize("training", (False, True))
def test_a_warm_decoder_compiles_nothing(training):
    decoder = dab_fast.DabDecoder(CONFIG).train(training)

    def step():
        inputs = torch.randn(B, Q, 32), torch.randn(B, S, 32, requires_grad=training)
        for images, mask in ((1, None), (B, torch.arange(S).expand(B, S) > 9)):
            with ops.backend("triton"), torch.set_grad_enabled(training):
                pos, anchors = torch.randn(images, S, 32), torch.randn(B, Q, 4, requires_grad=training)
                hidden, references = decoder(*inputs, pos, anchors, memory_key_padding_mask=mask)
                if training:
                    (hidden.square().sum() + references.sum()).backward()

    warm = kernels(lambda: dab_fast.warmup([(B, Q, S)], config=CONFIG, training=training, device="cpu"))
    cold = kernels(step)
    assert cold and cold <= warm, cold - warm


def test_leaves_the_generator_and_the_choice():
    before = torch.get_rng_state()
    dab_fast.warmup([(1, 2, 3)], config=CONFIG, training=False, dtype=torch.float16, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert ops.chosen_backend() == "auto"


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ops.BackendUnavailable, match=r"torch\.cuda\.is_available\(\) is False"):
        dab_fast.warmup([(1, 300, 1050)])
