"""When the accelerated Hugging Face model takes its original forward, and what its report says then."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import dab_fast
from tests.support.models import accelerated_copy, assert_same_outputs, huggingface_model, images, replicate


def test_output_attentions_steps_aside(caplog):
    model = huggingface_model()
    fast = accelerated_copy(model)
    inputs = images()
    with caplog.at_level(logging.WARNING, "dab_fast"), torch.no_grad():
        for _ in range(2):
            ours = fast(**inputs, output_attentions=True)
    theirs = model(**inputs, output_attentions=True)
    for a, b in zip(ours.cross_attentions, theirs.cross_attentions, strict=True):
        torch.testing.assert_close(a, b)
    reasons = fast.model.decoder.dab_fast_reasons
    assert len(reasons) == 1 and sum(reasons.values()) == 2
    assert sum("DabDetrDecoder takes" in line for line in caplog.messages) == 1
    assert "stepped aside 2 times" in str(dab_fast.accelerate(fast))


def _lora(decoder):
    import peft

    targets = ["fc1", "cross_attn_value_proj"]
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), decoder)


def _add_one(module, args, output):
    return output + 1


def _hook(decoder):
    decoder.layers[1].mlp.fc1.register_forward_hook(_add_one)
    return decoder


def _parametrize(decoder):
    nn.utils.parametrizations.weight_norm(decoder.layers[0].mlp.fc2)
    return decoder


def _patch(decoder):
    layer = decoder.layers[1].mlp
    original = layer.forward
    layer.forward = lambda hidden_states: original(hidden_states) + 1
    return decoder


def _quantize(decoder):
    torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear}, inplace=True)
    return decoder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [_lora, _hook, _parametrize, _patch, _quantize])
def test_changed_modules_step_aside(change):
    """What the weights alone no longer say: the original forward answers, and the report says why."""
    model = huggingface_model()
    change(model.model.decoder)
    fast = huggingface_model()
    report = dab_fast.accelerate(fast)
    change(fast.model.decoder)
    fast.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same_outputs(fast(**images()), model(**images()))
    assert "model.decoder" in report.stepped_aside


def _timed(module, calls):
    """What timing wrappers and accelerate's hooks do: the instance's forward calls the one it found."""
    found = module.forward

    def forward(
        inputs_embeds,
        encoder_hidden_states,
        memory_key_padding_mask,
        object_queries,
        query_position_embeddings,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        calls.append(object_queries.shape)
        return found(
            inputs_embeds,
            encoder_hidden_states,
            memory_key_padding_mask,
            object_queries,
            query_position_embeddings,
            output_attentions,
            output_hidden_states,
            return_dict,
        )

    module.forward = forward


def _dispatch(model):
    from accelerate import dispatch_model

    names = ("model.backbone", "model.query_refpoint_embeddings", "model.input_projection", "model.encoder")
    parts = (*names, "model.decoder", "class_embed", "bbox_predictor")
    return dispatch_model(model, device_map=dict.fromkeys(parts, "cpu"), force_hooks=True)


def test_a_decoder_patched_before_accelerate_is_left_alone():
    model, calls = huggingface_model(), []
    inputs = images()
    with torch.no_grad():
        expected = model(**inputs)
        _timed(model.model.decoder, calls)
        report = dab_fast.accelerate(model)
        assert set(report.replaced) == {"", "model", "model.backbone.conv_encoder", "model.encoder"}
        assert report.not_replaced == {"model.decoder": "its forward is patched"}
        assert_same_outputs(model(**inputs), expected)
    assert len(calls) == 1 and len(calls[0]) == 3 and calls[0][0] == 2, "the patch sees what the original gives it"
    assert "model.decoder left as it is: its forward is patched" in str(report)


@pytest.mark.parametrize("first", ["dispatch", "accelerate"])
def test_dispatched_models(first):
    """accelerate's `device_map` patches forward on every instance."""
    model = huggingface_model()
    fast = copy.deepcopy(model)
    if first == "dispatch":
        _dispatch(fast)
    report = dab_fast.accelerate(fast)
    if first == "accelerate":
        _dispatch(fast)
    with torch.no_grad():
        assert_same_outputs(fast(**images()), model(**images()))
    if first == "dispatch":
        assert report.not_replaced.keys() == {"", "model.backbone.conv_encoder", "model.encoder", "model.decoder"}
    assert "model.decoder" in report.stepped_aside or "model.decoder" in report.not_replaced


def test_a_decoder_patched_after_accelerate():
    model, calls = huggingface_model(), []
    fast = copy.deepcopy(model)
    report = dab_fast.accelerate(fast)
    _timed(fast.model.decoder, calls)
    with torch.no_grad():
        assert_same_outputs(fast(**images()), model(**images()))
    assert len(calls) == 1 and calls[0][0] == 2
    assert report.stepped_aside == {"model": {"the decoder's forward is patched": 1}}


def test_the_report_outlives_restore():
    model = huggingface_model()
    report = dab_fast.accelerate(model)
    _hook(model.model.decoder)
    with torch.no_grad():
        model(**images())
    dab_fast.refresh(model)  # of what is kept, the report says how much
    before, counted = str(report), report.stepped_aside
    assert counted and "stepped aside 1 times" in before
    dab_fast.restore(model)
    assert str(report) == before and report.stepped_aside == counted
    again = dab_fast.accelerate(model)
    assert not again.stepped_aside, "another accelerate after restore counts from zero"


def test_replicas_count_with_their_model_and_copies_for_themselves(caplog):
    model = huggingface_model()
    report = dab_fast.accelerate(model)
    _hook(model.model.decoder)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "dab_fast"):
        for _ in range(3):  # DataParallel makes new replicas for every call
            replicate(model)(**images())
    assert [sum(reasons.values()) for reasons in report.stepped_aside.values()] == [3]
    assert len(caplog.messages) == 1
    loaded = pickle.loads(pickle.dumps(model))
    dab_fast.accelerate(loaded)
    for twin in (copy.deepcopy(model), loaded):
        assert not twin.model.decoder.dab_fast_reasons
        with torch.no_grad():
            twin(**images())
        assert sum(twin.model.decoder.dab_fast_reasons.values()) == 1
    assert [sum(reasons.values()) for reasons in report.stepped_aside.values()] == [3]
