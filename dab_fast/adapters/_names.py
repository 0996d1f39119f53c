"""The canonical names of a checkpoint's tensors, into which and from which each codebase translates its own.

They are the names of IDEA-Research's whole model, the decoder's below "transformer.decoder.", with two differences:
the encoder's attention has q_proj, k_proj and v_proj, as transformers has it, and content that is learned is always
"transformer.patterns.weight". A tensor whose name a codebase does not know keeps that name, so that a message about a
tensor that does not fit can tell it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

DECODER = "transformer.decoder."
ENCODER = "transformer.encoder."
BACKBONE = "backbone.0.body."  # followed by torchvision's names of a ResNet


def prefix_before(mark: str, names: Iterable[str]) -> str | None:
    """What stands before `mark` in the first name that ends with it."""
    return next((name[: -len(mark)] for name in names if f".{name}".endswith(f".{mark}")), None)


def from_the_top(
    tensors: dict[str, Tensor],
    prefix: str,  # of the decoder in these tensors' names
    decoder: str,  # of the decoder in a whole model
) -> dict[str, Tensor]:
    """Give the tensors the names that they have in the whole model, whatever part or wrapper of it was saved."""
    if prefix.endswith(decoder):
        wrapper = prefix[: -len(decoder)]
        return {name.removeprefix(wrapper): x for name, x in tensors.items()}
    if decoder.endswith(prefix):
        return {decoder[: len(decoder) - len(prefix)] + name: x for name, x in tensors.items()}
    return {decoder + name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
