"""The accuracy rule of `dab_fast.accuracy` as assertions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dab_fast.accuracy import Call, Inputs, errors, outputs_and_gradients, root_of_squares


def assert_accurate(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],  # in float64
    own: Mapping[str, Tensor],  # PyTorch's, in the dtypes of `actual`
    terms: Mapping[str, Tensor] | None = None,  # of `root_of_squares`
    *,
    truncated: bool = False,  # as `dab_fast.accuracy.floor` says
) -> None:
    assert actual.keys() == exact.keys() == own.keys()
    for name, want in exact.items():
        assert actual[name].shape == want.shape and actual[name].dtype == own[name].dtype, name
    for name, error in errors(actual, exact, own, terms, truncated=truncated).items():
        assert error.fine, f"{name}: {error}"


def assert_as_specified(
    actual: Mapping[str, Tensor],
    specification: Call,
    inputs: Inputs,
    d_outputs: list[Tensor] | None = None,
    *,
    in_float64: Call | None = None,  # where the specification must be told its dtype
    interpreted: bool = False,  # by Triton's interpreter
) -> None:
    """That what `outputs_and_gradients` gave for an op is as accurate as its specification on the same inputs."""
    truth = in_float64 or specification
    exact = outputs_and_gradients(truth, inputs, d_outputs, dtype=torch.float64)
    own = outputs_and_gradients(specification, inputs, d_outputs)
    assert_accurate(actual, exact, own, root_of_squares(truth, inputs, d_outputs), truncated=interpreted)
