"""load_checkpoint: both codebases' files into a DabDecoder, an IDEA-Research decoder and a Hugging Face model."""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import pickle
import re
import traceback
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dab_fast
from dab_fast import DabDecoder, load_checkpoint
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support.idea_models import VARIANTS, D, H, L, drop_in, inputs, oracle
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
    fast = accelerated_copy(theirs.model.decoder)
    expected = fast.dab_fast_read(fast)[0]
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


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as opened:
        for name in names:
            opened.writestr(name, b"x")


def legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def with_tensor(change):
    """A state_dict of which one tensor is changed."""
    state, name = oracle().state_dict(), "layers.1.linear1.weight"
    return state | {name: change(state[name])}


def cut(write, size):
    def write_and_cut(path):
        write(path)
        path.write_bytes(path.read_bytes()[:size])

    return write_and_cut


def good(path):
    torch.save(oracle().state_dict(), path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
UNREADABLE = {
    "text": (
        lambda p: p.write_bytes(b"no checkpoint at all"),
        "torch.save or of safetensors, got text that begins 'no ",
    ),
    "bytes": (lambda p: p.write_bytes(bytes(range(99))), "torch.save or of safetensors, got bytes b"),
    "lfs": (lambda p: p.write_bytes(LFS), "is a Git LFS pointer, not the file itself"),
    "html": (lambda p: p.write_bytes(b"\xef\xbb\xbf\n<!DOCTYPE html><html>"), "is a saved web page"),
    "xml": (lambda p: p.write_bytes(b"<?xml version='1.0'?><Error>"), "is a saved web page"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), "is compressed by gzip"),
    "empty": (lambda p: p.write_bytes(b""), "is empty$"),
    "cut": (cut(good, 9999), "is cut short or damaged: it begins as a zip archive"),
    "cut_legacy": (cut(lambda p: legacy(p, oracle().state_dict()), 9999), "is cut short or damaged: "),
    "cut_at_once": (cut(lambda p: legacy(p, oracle().state_dict()), 2), "is cut short or damaged: EOFError$"),
    "zip": (lambda p: archive(p, "a.txt", "b/c.txt"), "but none of torch.save: it holds a.txt, b/c.txt$"),
    "torchscript": (lambda p: torch.jit.script(nn.Linear(2, 2)).save(str(p)), "is a TorchScript archive"),
    "payload": (lambda p: torch.save({"model": Payload()}, p), "holds print: dab_fast reads only tensors"),
    "module": (lambda p: torch.save(nn.Linear(2, 2), p), r"holds torch\.nn\.modules\.linear\.Linear: dab_fast reads"),
    "pickle": (
        lambda p: p.write_bytes(pickle.dumps({"a": 1}, 4)),
        "is damaged, or holds more than tensors and plain values",
    ),
    "list": (lambda p: torch.save([1, 2], p), "must hold a DAB-DETR state_dict .* got list$"),
    "nothing": (lambda p: torch.save({}, p), "must hold a DAB-DETR state_dict .* got an empty dict$"),
    "linear": (lambda p: torch.save(nn.Linear(2, 2).state_dict(), p), "got a dict with keys bias, weight$"),
    "two": (
        lambda p: torch.save({"a": oracle().state_dict(), "b": {"c": oracle().state_dict()}}, p),
        r"must hold one state_dict, or one under model, got a, b\.c: save one by itself$",
    ),
    "number": (lambda p: torch.save({"model": oracle().state_dict() | {"n": 1}}, p), "got n, which is of type int$"),
    "sparse": (
        lambda p: torch.save(with_tensor(Tensor.to_sparse), p),
        "got layers.1.linear1.weight, which is sparse_coo",
    ),
    "meta": (lambda p: torch.save(with_tensor(lambda x: x.to("meta")), p), "weight, which is on the meta device$"),
    "quantised": (
        lambda p: torch.save(with_tensor(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), p),
        "weight, which is quantised$",
    ),
    "integers": (
        lambda p: torch.save(with_tensor(Tensor.long), p),
        r"layers\.1\.linear1\.weight must be floating point, got torch\.int64$",
    ),
    "complex": (lambda p: torch.save(with_tensor(lambda x: x + 0j), p), "must be floating point, got torch.complex64$"),
    "dropout": (
        lambda p: save_pth(p, oracle().state_dict(), argparse.Namespace(**(vars(ARGS) | {"dropout": "a tenth"}))),
        "must describe a decoder that there is: ",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors"])
@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_files(what, name, tmp_path, capsys):
    write, message = UNREADABLE[what]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))} .*{message}") as raised:
        load_checkpoint(tmp_path / name)
    text = "".join(traceback.format_exception(raised.value))
    assert "weights_only=False" not in text and "\n" not in str(raised.value)
    assert "code ran" not in capsys.readouterr().out


def directory(**files):
    """A file is text, or what json writes as text; None is a directory."""

    def write(path):
        for name, content in files.items():
            file = path / {"index": "model.safetensors.index.json", "config": "config.json"}.get(name, name)
            if content is None:
                file.mkdir()
            else:
                file.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def saved(**files):
    def write(path):
        huggingface_model().save_pretrained(path)
        return directory(**files)(path)

    return write


def index(*names):
    return {"weight_map": {str(i): name for i, name in enumerate(names)}}


INDEX = r"model\.safetensors\.index\.json"


@pytest.mark.parametrize(
    "write, error, message",
    [
        (directory(), FileNotFoundError, "got .*, which holds nothing$"),
        (directory(**{"pytorch_model.bin": "x"}), FileNotFoundError, "which holds pytorch_model.bin$"),
        (directory(index={"metadata": {}}), ValueError, f"{INDEX} must have a weight_map"),
        (directory(index={"weight_map": ["a"]}), ValueError, f"{INDEX} must have a weight_map"),
        (directory(index={"weight_map": {"a": 1}}), ValueError, f"{INDEX} must have a weight_map"),
        (directory(index=index()), ValueError, f"{INDEX} must have a weight_map"),
        (directory(index="{"), ValueError, f"{INDEX} must be JSON: "),
        (directory(index=LFS.decode()), ValueError, f"{INDEX} is a Git LFS pointer"),
        (
            directory(index=index("model-1.safetensors")),
            FileNotFoundError,
            f"{INDEX} names model-1.safetensors, which does",
        ),
        (directory(index=index("../x.safetensors")), ValueError, f"{INDEX} must name files in its own .* got ../x"),
        (directory(index=index("a/../../x.safetensors")), ValueError, f"{INDEX} must name files in its own"),
        (
            directory(index=index("/etc/hostname")),
            ValueError,
            f"{INDEX} must name files in its own .* got /etc/hostname$",
        ),
        (directory(index=index("shard"), shard=None), ValueError, "shard must be a file$"),
        (directory(index=index("shard"), shard="<html>"), ValueError, "shard is a saved web page"),
        (
            directory(index=index("shard"), shard="hello, this is text"),
            ValueError,
            "shard must be a readable safetensors",
        ),
        (saved(config="{'a': 1}"), ValueError, r"config\.json must be JSON: "),
        (saved(config=[1]), ValueError, r"config\.json must be a JSON object, got list$"),
        (saved(config=""), ValueError, r"config\.json is empty$"),
        (saved(config={"decoder_attention_heads": "four"}), ValueError, "must describe a decoder that there is: "),
    ],
)
def test_unreadable_directories(write, error, message, tmp_path):
    with pytest.raises(error, match=message) as raised:
        load_checkpoint(write(tmp_path))
    assert type(raised.value) is error and str(tmp_path) in str(raised.value)


def test_shards_may_be_links_that_lead_elsewhere(tmp_path):
    """Hugging Face's cache is made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    huggingface_model().save_pretrained(tmp_path / "blobs", max_shard_size="100KB")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert isinstance(load_checkpoint(tmp_path / "snapshot"), DabDecoder)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"ema": {"module": state, "updates": 3}, "epoch": 1},
        lambda state: {"model": state, "model_ema": {name: x + 1 for name, x in state.items()}},
        lambda state: {"model": {f"module.transformer.decoder.{name}": x for name, x in state.items()}},
        lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
    ],
    ids=["state_dict", "ema", "model_and_ema", "ddp", "compiled"],
)
def test_a_state_dict_inside_dicts(wrap, tmp_path):
    state = oracle().state_dict()
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "checkpoint.pth", nhead=H).state_dict(), state, rtol=0, atol=0
    )


def test_the_content_tells_the_format(tmp_path):
    state = oracle().state_dict()
    save_file(state, tmp_path / "checkpoint.pth")
    torch.save(state, tmp_path / "model.safetensors")
    for path in tmp_path.iterdir():
        torch.testing.assert_close(load_checkpoint(path, nhead=H).state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_and_load(value, tmp_path):
    state = with_tensor(lambda x: x.index_fill(0, torch.tensor(1), value))
    path = save_pth(tmp_path / "checkpoint.pth", state)
    with pytest.warns(UserWarning, match=r"has NaN or infinite values in layers\.1\.linear1\.weight$"):
        loaded = load_checkpoint(path)
    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0, equal_nan=True)


def test_arguments_that_do_not_fit(tmp_path):
    def expect(error, message, path, *args, **kwargs):
        with pytest.raises(error, match=message):
            load_checkpoint(path, *args, **kwargs)

    expect(FileNotFoundError, "which does not exist", tmp_path / "none.pth")
    expect(TypeError, "path must be a str or an os.PathLike, got dict", {})
    expect(TypeError, "path must be a str or an os.PathLike, got bytes", b"checkpoint.pth")
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
