"""What accelerate() says of what it cannot take, and that a mask which does not fit is the original's affair."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DabDetrForObjectDetection
from transformers.models.dab_detr.modeling_dab_detr import DabDetrDecoder

import dab_fast
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from dab_fast.adapters.idea_research.models import FastTransformerDecoder
from tests.support.idea_models import B, H, Q, S, accelerated, inputs, oracle
from tests.support.models import accelerated_copy, huggingface_model, images


def exported():
    return torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: torch.jit.script(nn.Linear(2, 2)), ValueError, "RecursiveScriptModule: .*before torch.jit"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), ValueError, "Sequential: .*before torch.jit"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), ValueError, "TracedModule: .*before torch.jit"),
        (lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)), ValueError, "GraphModuleImpl: accelerate the original"),
        (lambda: exported().module(), ValueError, "GraphModuleImpl: accelerate the original module"),
        (exported, TypeError, "got an ExportedProgram: give the original module, before torch.export"),
        (lambda: nn.Linear, TypeError, "got the class Linear: give an instance"),
        (lambda: torch.compile(nn.Linear(2, 2).forward), TypeError, "got a function: give the module itself"),
        (lambda: nn.Linear(2, 2).state_dict(), TypeError, "got OrderedDict$"),
    ],
    ids=["script", "script_inside", "trace", "fx", "export_module", "export", "class", "function", "state_dict"],
)
def test_what_is_no_module_with_a_decoder(make, error, message):
    with pytest.raises(error, match=f"^model must .*{message}"):
        dab_fast.accelerate(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("parts", ["decoder", (), ("decoder", "neck"), ["Decoder"]], ids=str)
def test_parts_that_there_are_not(parts):
    model = huggingface_model()
    with pytest.raises(ValueError, match=r"parts must be some of .*'encoder', 'decoder'.*, got "):
        dab_fast.accelerate(model, parts=parts)
    assert type(model.model.decoder) is DabDetrDecoder


def test_the_last_parts_hold():
    model, given = huggingface_model(), images(padded=True)
    expected = model(**given).pred_boxes
    report = dab_fast.accelerate(model, parts=("decoder",))
    assert "" not in report.replaced and "model.decoder" in report.replaced
    assert type(model) is DabDetrForObjectDetection
    report = dab_fast.accelerate(model, parts=("head",))
    assert set(report.replaced) == {""}
    assert "(model): DabDetrForObjectDetection, head" in str(report)
    handle = model.model.decoder.layers[0].register_forward_hook(lambda *_: None)  # which steps a fast decoder aside
    assert (model(**given).pred_boxes - expected).abs().max() < BOX_TOLERANCE
    assert not model.model.decoder.dab_fast_reasons
    handle.remove()
    dab_fast.restore(model)
    assert type(model.model.decoder) is DabDetrDecoder and type(model) is DabDetrForObjectDetection


def test_a_scripted_part_is_left_alone():
    model = nn.ModuleList([torch.jit.script(nn.Linear(2, 2)), oracle()])
    assert list(dab_fast.accelerate(model).replaced) == ["1"]


def test_a_compiled_model_is_compiled_anew():
    model, graphs = oracle(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(**inputs())
        before = len(graphs)
        dab_fast.accelerate(compiled)
        got = compiled(**inputs())
    assert len(graphs) > before
    assert isinstance(model, FastTransformerDecoder)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=BOX_TOLERANCE)


def outcome(function, *args, **kwargs):
    """What a call gives, or the error it raises."""
    with torch.no_grad():
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return error


def assert_same_outcome(got, expected, tolerance):
    if isinstance(expected, Exception):
        assert type(got) is type(expected) and str(got) == str(expected)
    else:
        assert not isinstance(got, Exception), got
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def last_one(shape, value):
    """A mask whose last column is `value`, unless that is all of it."""
    mask = torch.full(shape, not value)
    if shape[-1] > 1:
        mask[..., -1] = value
    return mask


def key_masks(keys):
    return [(B, keys), (1, keys), (B, 1), (B + 1, keys), (keys,), (B, keys + 1), (B, 1, keys)]


def query_masks(keys):
    three = [(1, Q, keys), (B, Q, keys), (B * H, Q, keys), (B * H + 1, Q, keys)]
    return [(Q, keys), (Q, 1), (1, keys), (Q, keys + 1), (B, keys), (keys,), (B, H, Q, keys), *three]


@pytest.mark.parametrize(
    "name, shape",
    [
        *(("memory_key_padding_mask", shape) for shape in key_masks(S)),
        *(("tgt_key_padding_mask", shape) for shape in key_masks(Q)),
        *(("memory_mask", shape) for shape in query_masks(S)),
        *(("tgt_mask", shape) for shape in query_masks(Q)),
    ],
)
def test_a_mask_of_any_shape_does_what_it_does_in_the_idea_research_decoder(name, shape):
    theirs = oracle()
    given = inputs() | {name: last_one(shape, True)}
    assert_same_outcome(outcome(accelerated(theirs), **given), outcome(theirs, **given), HIDDEN_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [*key_masks(12), (1, 1, 1, 12), (3, 1, 1, 12), (2, 1, 5, 12)])
def test_a_padding_mask_of_any_shape_does_what_it_does_in_the_huggingface_decoder(shape, batch, dtype):
    theirs = huggingface_model().model.decoder
    torch.manual_seed(0)
    given = {
        "inputs_embeds": torch.randn(batch, 5, 64),
        "encoder_hidden_states": torch.randn(batch, 12, 64),
        "memory_key_padding_mask": last_one(shape, False).to(dtype),
        "object_queries": torch.randn(batch, 12, 64),
        "query_position_embeddings": torch.randn(batch, 5, 4),
        "return_dict": False,
    }
    got = outcome(accelerated_copy(theirs), **given)
    assert_same_outcome(got, outcome(theirs, **given), HIDDEN_TOLERANCE)


def test_positions_of_one_image_for_two_raise_as_in_the_huggingface_decoder():
    theirs = huggingface_model().model.decoder
    given = {
        "inputs_embeds": torch.randn(2, 5, 64),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "memory_key_padding_mask": None,
        "object_queries": torch.randn(1, 12, 64),
        "query_position_embeddings": torch.randn(2, 5, 4),
    }
    expected = outcome(theirs, **given)
    assert isinstance(expected, RuntimeError)
    assert_same_outcome(outcome(accelerated_copy(theirs), **given), expected, 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(2, 96, 128), (1, 96, 128), (3, 96, 128), (2, 48, 64), (2, 103, 128), (96, 128)])
def test_a_pixel_mask_of_any_shape_does_what_it_does_in_the_huggingface_model(shape, padded):
    theirs, pixels = huggingface_model(), images()["pixel_values"]
    mask = torch.ones(shape)
    if padded:
        mask[..., shape[-1] // 2 :] = 0

    def boxes(model):
        return model(pixels, mask).pred_boxes

    assert_same_outcome(outcome(boxes, accelerated_copy(theirs)), outcome(boxes, theirs), BOX_TOLERANCE)
