"""The box MLP, the inverse sigmoid of the old box, sum, sigmoid: the refined box."""

from __future__ import annotations

from torch import Tensor

from dab_fast import reference
from dab_fast.ops._checks import check_tensor


def refine_boxes(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4] in [0, 1]
    w1: Tensor,  # [D, D]
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    *,
    eps: float,
) -> Tensor:  # [..., 4], at least float32
    """sigmoid(W3 relu(W2 relu(W1 hidden + b1) + b2) + b3 + inverse_sigmoid(boxes)): the refined boxes."""
    check_tensor("hidden", hidden, (None,), leading=True)
    d = hidden.shape[-1]
    check_tensor("boxes", boxes, (*hidden.shape[:-1], None), like=hidden)
    if boxes.shape[-1] not in (2, 4):
        raise ValueError(f"boxes must have shape [..., 2] or [..., 4], got {list(boxes.shape)}")
    for name, x, shape in (
        ("w1", w1, (d, d)),
        ("b1", b1, (d,)),
        ("w2", w2, (d, d)),
        ("b2", b2, (d,)),
        ("w3", w3, (4, d)),
        ("b3", b3, (4,)),
    ):
        check_tensor(name, x, shape, like=hidden)
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps must be in (0, 0.5), got {eps}")
    return reference.refine_boxes(hidden, boxes, w1, b1, w2, b2, w3, b3, eps=eps)
