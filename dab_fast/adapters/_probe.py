"""Whether an original forward computes what the fast one does: both run on a copy of the decoder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dab_fast.accuracy import PROBE_TOLERANCE
from dab_fast.config import DecoderConfig
from dab_fast.parameters import StepAside

Run = Callable[..., list[Tensor]]  # the fast forward of a decoder and its arguments: hidden states, reference points
Read = Callable[[nn.Module], tuple[dict[str, Tensor], DecoderConfig]]  # the parameters of a decoder, and which it is


@torch.no_grad()
def probe(decoder: nn.Module, run: Run, read: Read) -> None:
    """Raise StepAside unless the original forward and the fast one agree on a copy with random parameters.

    In training without dropout too, and twice: what is random there, or counts its calls, is not the original's.
    """
    try:
        decoder, randn = _randomized_copy(decoder)
    except Exception as error:
        raise StepAside(f"it cannot be copied: {error}") from error
    given = _random_queries(read(decoder.eval())[1], randn)
    with torch.random.fork_rng(devices=[]):
        for training in (False, True, True):
            _compare(decoder.train(training), run, given, " in training" if training else "")


def _random_queries(config: DecoderConfig, randn: Callable[..., Tensor]) -> dict[str, Any]:
    b, q, s, d = 2, 5, 6, config.d_model
    anchors = randn(q, b, config.query_dim)
    anchors[0, :, :2] = -9.0  # a center of 1e-4 shows the eps of the inverse sigmoid
    groups = torch.arange(q) >= 3
    return {
        "tgt": randn(q, b, d),
        "memory": randn(s, b, d),
        "tgt_mask": groups[:, None] ^ groups,
        "memory_mask": None,
        "tgt_key_padding_mask": None,
        "memory_key_padding_mask": torch.arange(s).expand(b, s) >= torch.tensor([[s], [s - 2]]),
        "pos": randn(s, b, d),
        "refpoints_unsigmoid": anchors,
    }


def _compare(decoder: nn.Module, run: Run, given: dict[str, Any], when: str) -> None:
    expected_states, expected_references = run(decoder, **given)
    random_state = torch.get_rng_state()
    try:
        hidden_states, references = type(decoder).forward(decoder, **given)  # hooks are not called
    except Exception as error:
        raise StepAside(f"its forward raises {type(error).__name__} on a copy{when}: {error}") from error
    if not torch.equal(torch.get_rng_state(), random_state):
        raise StepAside(f"it draws random numbers{when} with every dropout rate at 0")
    for name, got, expected in (
        ("hidden states", hidden_states, expected_states),
        ("reference points", references.logit(1e-7), expected_references.logit(1e-7)),
    ):
        if got.shape != expected.shape:
            raise StepAside(f"its {name} have shape {list(got.shape)}{when}, not {list(expected.shape)}")
        difference = (got - expected).abs().max().item()
        if not difference <= PROBE_TOLERANCE:
            raise StepAside(f"its {name} are not what the original computes{when}: they differ by {difference:.1e}")


def _randomized_copy(module: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A float32 copy on the CPU without dropout whose parameters hide nothing, and its source of random numbers."""
    randn = seeded_randn()
    module = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):  # an attention's rate
            part.dropout = 0.0  # type: ignore[assignment]
    for parameter in module.parameters():
        noise = randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
    return module, randn


def seeded_randn() -> Callable[..., Tensor]:
    """Random numbers that leave the user's generator where it is."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
