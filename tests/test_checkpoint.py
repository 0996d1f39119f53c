"""load_checkpoint: both codebases' files into a DabDecoder, an IDEA-Research decoder and a Hugging Face model."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dab_fast
from dab_fast import DabDecoder, load_checkpoint
from tests.support.idea_models import BOX_TOLERANCE, HIDDEN_TOLERANCE, VARIANTS, D, H, L, drop_in, inputs, oracle
from tests.support.idea_second_model import Model
from tests.support.models import accelerated_copy, huggingface_model, images, perturb_

ARGS = argparse.Namespace(nheads=H, transformer_activation="prelu", dropout=0.25, lr=1e-4, output_dir="here")


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def save_pth(path, state, args=ARGS, prefix="transformer.decoder."):
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}
    content = {"model": {prefix + name: x for name, x in state.items()}, "optimizer": optimizer, "epoch": 3}
    torch.save(content | ({"args": args} if args else {}), path)
    return path


def query_first(decoder, query_dim=4):
    """A DabDecoder on the inputs of the query-first decoders."""
    given = {name: x.transpose(0, 1) for name, x in inputs(query_dim).items()}
    with torch.no_grad():
        return decoder(given["tgt"], given["memory"], given["pos"], given["refpoints_unsigmoid"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_idea_research_file_becomes_the_decoder_it_describes(variant, tmp_path, no_warning):
    options = VARIANTS[variant]
    theirs = oracle(**options)
    args = argparse.Namespace(**(vars(ARGS) | {"transformer_activation": options.get("activation", "prelu")}))
    ours = load_checkpoint(save_pth(tmp_path / "checkpoint.pth", theirs.state_dict(), args))
    assert type(ours) is DabDecoder and not ours.training
    assert ours.config.inverse_sigmoid_eps == 1e-3
    assert (ours.config.dropout, ours.config.attention_dropout, ours.config.activation_dropout) == (0.25,) * 3
    with torch.no_grad():
        expected = theirs(**inputs(options.get("query_dim", 4)))
    got = query_first(ours, options.get("query_dim", 4))
    torch.testing.assert_close(got.hidden_states, expected[0], rtol=0, atol=HIDDEN_TOLERANCE)
    torch.testing.assert_close(got.reference_points, expected[1], rtol=0, atol=BOX_TOLERANCE)


@pytest.mark.parametrize("prefix", ["module.transformer.decoder.", "decoder.", "", "model.detr.decoder_of_mine."])
def test_any_prefix_and_a_bare_state_dict(prefix, tmp_path):
    theirs = oracle()
    torch.save({prefix + name: x for name, x in theirs.state_dict().items()}, tmp_path / "bare.pt")
    ours = load_checkpoint(tmp_path / "bare.pt", nhead=H)
    assert ours.config.nhead == H
    for name, x in ours.state_dict().items():
        torch.testing.assert_close(x, theirs.state_dict()[name], rtol=0, atol=0)


def test_what_a_file_does_not_state(tmp_path):
    path = save_pth(tmp_path / "a.pth", oracle().state_dict(), args=None)
    with pytest.warns(UserWarning, match="does not state nhead: taking 8"):
        assert load_checkpoint(path).config.nhead == 8
    path = save_pth(tmp_path / "b.pth", oracle(activation="gelu").state_dict(), args=None)
    with pytest.raises(ValueError, match="activation must be given"):
        load_checkpoint(path, nhead=H)
    assert load_checkpoint(path, nhead=H, activation="gelu").config.activation == "gelu"


def whole_model(**options):
    torch.manual_seed(0)
    model = Model(**options)
    perturb_(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def run_huggingface(model):
    with torch.no_grad():
        return model(**images())


def run_idea_research(model, huggingface):
    """The memory's sine embedding has no parameters, so Hugging Face's serves both."""
    pixels = images()["pixel_values"]
    with torch.no_grad():
        _, positions = huggingface.model.backbone(pixels, torch.ones(2, *pixels.shape[-2:]))
        return model(pixels, positions[-1].flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    "options, patterns",
    [({}, 0), ({"patterns": 2}, 2), ({"label_classes": 5}, 1), ({"label_classes": 5, "patterns": 2}, 2)],
    ids=["default", "patterns", "dn", "dn_patterns"],
)
def test_idea_research_file_into_a_whole_huggingface_model(options, patterns, accelerated, tmp_path):
    theirs = whole_model(**options)
    path = save_pth(tmp_path / "checkpoint.pth", theirs.state_dict(), prefix="")
    ours = huggingface_model(num_patterns=patterns)
    if accelerated:
        dab_fast.accelerate(ours)
    with pytest.warns(UserWarning, match="eps of 0.001, and DabDetrForObjectDetection has 1e-05"):
        assert load_checkpoint(path, ours) is ours
    got, (logits, boxes) = run_huggingface(ours), run_idea_research(theirs, ours)
    torch.testing.assert_close(got.logits, logits, rtol=0, atol=HIDDEN_TOLERANCE)
    torch.testing.assert_close(got.pred_boxes, boxes, rtol=0, atol=BOX_TOLERANCE)
    assert ours.bbox_predictor.layers[2].weight is ours.model.decoder.bbox_embed.layers[2].weight


def test_timm_backbone_keeps_torchvisions_names():
    from dab_fast.checkpoint import _to_huggingface

    names = _to_huggingface(whole_model().state_dict(), torchvision_names=True)
    assert "model.backbone.conv_encoder.model._backbone.layer2.0.downsample.1.running_var" in names


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("what", ["directory", "file"])
def test_huggingface_directory_into_every_kind_of_model(what, sharded, tmp_path, no_warning):
    theirs = huggingface_model(dropout=0.3, attention_dropout=0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    if what == "file" and sharded:
        state = {}
        for shard in tmp_path.glob("*.safetensors"):
            state |= load_file(shard)
        save_file(state, tmp_path / "all.safetensors")
    name = "all.safetensors" if sharded else "model.safetensors"
    path = tmp_path if what == "directory" else tmp_path / name

    whole = huggingface_model()
    perturb_(whole, seed=9)
    bare = copy.deepcopy(whole.model)
    load_checkpoint(path, whole)
    load_checkpoint(path, bare)
    for key, value in run_huggingface(theirs).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(run_huggingface(whole)[key], value, rtol=0, atol=0)
    torch.testing.assert_close(bare.state_dict(), theirs.model.state_dict(), rtol=0, atol=0)

    decoder = load_checkpoint(path)
    assert decoder.config.inverse_sigmoid_eps == 1e-5 and decoder.config.nhead == 4
    assert (decoder.config.dropout, decoder.config.attention_dropout) == (0.3, 0.1)
    expected = accelerated_copy(theirs.model.decoder)._read()[0]
    torch.testing.assert_close(decoder.state_dict(), {name: x.detach() for name, x in expected.items()}, rtol=0, atol=0)


def test_huggingfaces_numbered_blocks(tmp_path):
    theirs = huggingface_model()
    theirs.save_pretrained(tmp_path)
    blocks = {".self_attn.": ".layer.0.", ".cross_attn.": ".layer.1.", ".mlp.": ".layer.2."}

    def old(name):
        head, dot, block = name.partition("decoder.layers.")
        for new_name, old_name in blocks.items():
            block = block.replace(new_name, old_name, 1) if new_name in block[:14] else block
        return head + dot + block

    old_state = {old(name): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert any(".layer.2.fc1." in name for name in old_state)
    save_file(old_state, tmp_path / "model.safetensors")
    ours = huggingface_model()
    perturb_(ours, seed=9)
    load_checkpoint(tmp_path, ours)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_eps_follows_the_checkpoint_or_a_warning_says_so(tmp_path):
    theirs = huggingface_model()
    theirs.save_pretrained(tmp_path / "hf")
    idea = save_pth(tmp_path / "checkpoint.pth", whole_model().state_dict(), prefix="")
    decoder = load_checkpoint(idea)
    assert decoder.config.inverse_sigmoid_eps == 1e-3
    assert load_checkpoint(tmp_path / "hf", decoder).config.inverse_sigmoid_eps == 1e-5
    assert load_checkpoint(idea, decoder).config.inverse_sigmoid_eps == 1e-3
    with pytest.warns(UserWarning, match="eps of 1e-05, and TransformerDecoder has 0.001"):
        load_checkpoint(tmp_path / "hf", whole_model().transformer.decoder)


def test_drop_in_and_originals_decoder(tmp_path, no_warning):
    theirs = oracle()
    path = save_pth(tmp_path / "checkpoint.pth", theirs.state_dict())
    for ours in (drop_in(), oracle()):
        perturb_(ours, seed=9)
        load_checkpoint(path, ours)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: without(s, "layers.1.norm2.bias"), r"does not fit the DabDecoder: missing layers\.1\.norm2\.bias$"),
        (lambda s: s | {"layers.1.gate": torch.ones(1)}, r"unexpected layers\.1\.gate$"),
        (
            lambda s: s | {"layers.2.linear1.bias": torch.ones(7)},
            r"layers\.2\.linear1\.bias must have shape \[48\], got \[7\]$",
        ),
        (
            lambda s: without(s, *[name for name in s if name.startswith("layers.1.")]),
            r"missing layers\.1\.activation\.weight, .* and \d+ more$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(edit, message, tmp_path):
    path = save_pth(tmp_path / "checkpoint.pth", edit(oracle().state_dict()))
    model = DabDecoder(d_model=D, nhead=H, num_layers=L, dim_feedforward=48, inverse_sigmoid_eps=1e-5)
    before, config = copy.deepcopy(model.state_dict()), model.config
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.config is config


def test_a_decoder_of_other_heads_or_activation_is_refused(tmp_path):
    path = save_pth(tmp_path / "a.pth", oracle().state_dict())
    with pytest.raises(ValueError, match=r"model must have nhead=4 as .* states"):
        load_checkpoint(path, DabDecoder(d_model=D, nhead=8, num_layers=L, dim_feedforward=48))
    args = argparse.Namespace(nheads=H, transformer_activation="relu")
    path = save_pth(tmp_path / "b.pth", oracle(activation="relu").state_dict(), args)
    with pytest.raises(ValueError, match="model must have activation='relu'"):
        load_checkpoint(path, DabDecoder(d_model=D, nhead=H, num_layers=L, dim_feedforward=48, activation="gelu"))


class Payload:
    def __reduce__(self):
        return print, ("code ran while reading a checkpoint",)


def test_unreadable_files(tmp_path, capsys):
    def expect(error, message, path, *args, **kwargs):
        with pytest.raises(error, match=message):
            load_checkpoint(path, *args, **kwargs)

    expect(FileNotFoundError, "which does not exist", tmp_path / "none.pth")
    expect(FileNotFoundError, "path must be a directory with model.safetensors or", tmp_path)
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"no checkpoint at all")
    expect(ValueError, "must be readable by torch.load", garbage)
    garbage.rename(tmp_path / "garbage.safetensors")
    expect(ValueError, "must be a readable safetensors file", tmp_path / "garbage.safetensors")
    torch.save({"model": Payload()}, tmp_path / "payload.pth")
    expect(ValueError, r"must be readable by torch.load\(weights_only=True\)", tmp_path / "payload.pth")
    assert "code ran" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    expect(ValueError, "must hold a state_dict, or one under .model., got list", tmp_path / "list.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    expect(ValueError, "must be a DAB-DETR checkpoint .* got tensors bias, weight", tmp_path / "linear.pth")
    (tmp_path / "torn").mkdir()
    index = {"weight_map": {"a": "model-00001.safetensors"}}
    (tmp_path / "torn" / "model.safetensors.index.json").write_text(json.dumps(index))
    expect(ValueError, "model-00001.safetensors must be a readable", tmp_path / "torn")
    good = save_pth(tmp_path / "good.pth", oracle().state_dict())
    expect(TypeError, "model must be a DabDecoder.* got torch.nn.modules.linear.Linear", good, nn.Linear(2, 2))
    expect(ValueError, "nhead must not be given with model", good, drop_in(), nhead=4)
    expect(ValueError, "does not fit the DabDetrForObjectDetection", good, huggingface_model())
    with torch.device("meta"):
        meta = DabDecoder(d_model=D, nhead=H, num_layers=L, dim_feedforward=48)
    expect(ValueError, "meta device", good, meta)


def test_read_back_what_was_saved(tmp_path):
    ours = DabDecoder(d_model=D, nhead=H, num_layers=L, dim_feedforward=48)
    perturb_(ours)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    again = load_checkpoint(tmp_path / "ours.pt", nhead=H)
    assert again.config == ours.config
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert isinstance(pickle.loads(pickle.dumps(again)), DabDecoder)
