"""The command line: what it prints where, its exit codes, and that its checks can fail."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig
from typer.testing import CliRunner

import dab_fast
from dab_fast import DabDecoder, accuracy, load_checkpoint, measure, validation
from dab_fast.bench import by_parts
from dab_fast.cli import demo
from dab_fast.cli.inputs import InputError
from dab_fast.cli.main import app
from dab_fast.ops._examples import examples
from tests.support.idea_second_model import Model
from tests.support.models import huggingface_model, perturb_


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    huggingface_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "stripes.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    monkeypatch.setattr(demo, "SHORTER", 160)
    monkeypatch.setattr(demo, "STEP_SIZE", (64, 96))


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Times are not what these tests are about."""
    timed = measure.interleaved_times
    monkeypatch.setattr(measure, "interleaved_times", lambda fns, rounds, **options: timed(fns, 1, **options))


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def test_demo_table_and_picture(checkpoint, photo, tmp_path):
    picture = tmp_path / "out.png"
    result = invoke("demo", photo, "--checkpoint", checkpoint, "--output", picture)
    assert result.exit_code == 0, result.output
    assert "PASS" in result.stdout and "largest box difference" in result.stdout and "ATen calls" in result.stdout
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_demo_json_is_one_object_on_stdout(checkpoint, photo, tmp_path):
    result = invoke("demo", photo, "--checkpoint", checkpoint, "--json", "--output", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert 0 <= found["max_box_difference_px"] <= accuracy.DEMO_BOX_PX
    assert found["passed"] and found["failures"] == [] and found["stepped_aside"] == {}
    assert found["size"] == [240, 160] and found["tokens"] == 5 * 8
    assert list(found["parts"]) == ["backbone", "encoder", "decoder", "whole model", "training step"]
    for part in found["parts"].values():
        assert part["ms"]["original"] > 0 and part["ms"]["accelerated"] > 0
        assert part["difference"] < 1e-4
    for name in ("decoder", "whole model", "training step"):
        assert found["parts"][name]["aten_calls"]["accelerated"] < found["parts"][name]["aten_calls"]["original"]
    assert found["peers"] == {}
    assert found["median_box_move_px"] > demo.LEAST_MOVE_PX
    assert result.stderr


def test_a_wrecked_decoder_fails(checkpoint, photo, tmp_path):
    result = invoke("demo", photo, "--checkpoint", checkpoint, "--wreck", "--output", tmp_path / "out.png")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout and "boxes differ" in result.stdout


@pytest.mark.parametrize("module", ["dab_fast", "dab_fast.cli"])
def test_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "bench", "--device", "tpu9"], capture_output=True, text=True)
    assert done.returncode == 2 and "--device must be" in done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_demo_in_half_precision(checkpoint, photo, tmp_path, dtype):
    result = invoke(
        "demo", photo, "--checkpoint", checkpoint, "--json", "--dtype", dtype, "--output", tmp_path / "out.png"
    )
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["failures"]
    assert found["dtype"] == dtype and "autocast" in found["compared"]
    assert found["allowed_box_difference_px"] > accuracy.DEMO_BOX_PX


@pytest.mark.parametrize(
    "args, says",
    [
        (["missing.png"], "IMAGE cannot be read"),
        (["{text}"], "IMAGE must be a picture"),
        (["--device", "tpu9"], "--device must be"),
        (["--device", "cuda:77"], "--device cuda:77 is not here"),
        (["--dtype", "int8"], "--dtype must be float32, bfloat16, float16"),
        (["--checkpoint", "nowhere"], "--checkpoint must be a directory"),
        (["--checkpoint", "{other}"], "must hold a dab-detr model, got resnet"),
        (["--checkpoint", "{empty}"], "cannot be read"),
        (["--output", "out.exe"], "--output must end with"),
        (["--output", "nowhere/out.png"], "--output must lie in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, says, tmp_path):
    text, other, empty = tmp_path / "text.png", tmp_path / "other", tmp_path / "empty"
    text.write_text("no picture")
    for folder, kind in ((other, "resnet"), (empty, "dab-detr")):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    result = invoke("demo", *(arg.format(text=text, other=other, empty=empty) for arg in args))
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "…" not in line]
    assert len(errors) == 1 and errors[0].startswith("dab-fast demo: ") and says in errors[0]


def test_a_checkpoint_that_lacks_parameters(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(checkpoint / "model.safetensors")
    dropped = "model.decoder.layernorm.weight"
    state.pop(dropped)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(InputError, match=f"lacks 1 parameters, the first is {dropped}"):
        demo.load_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def idea_research_file(tmp_path_factory):
    """A whole IDEA-Research model as its training script saves one, with what a file says of itself by `edit`."""
    torch.manual_seed(0)
    model = Model(patterns=2).eval()
    perturb_(model)
    folder = tmp_path_factory.mktemp("idea_research")

    def save(edit=lambda state: state, **args):
        path = folder / "checkpoint.pth"
        given = {"nheads": 4, "transformer_activation": "prelu", "dropout": 0.1} | args
        torch.save({"model": edit(model.state_dict()), "args": argparse.Namespace(**given)}, path)
        return path

    return save


EPS_WARNING = "ignore:.*was trained with an inverse-sigmoid eps of 0.001"


@pytest.mark.filterwarnings(EPS_WARNING)
def test_demo_of_an_idea_research_file(idea_research_file, photo, tmp_path):
    path = idea_research_file()
    result = invoke("demo", photo, "--checkpoint", path, "--json", "--output", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] and found["weights"] == "checkpoint checkpoint.pth"


@pytest.mark.filterwarnings(EPS_WARNING)
def test_the_model_of_an_idea_research_file(idea_research_file):
    """What the file states is taken, and what it does not state is what was published."""
    model = demo.load_checkpoint(idea_research_file(pe_temperatureH=7, pe_temperatureW=9))
    expected = huggingface_model(num_patterns=2)
    load_checkpoint(idea_research_file(), expected)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    config = model.config
    assert not model.training and (config.encoder_attention_heads, config.decoder_attention_heads) == (4, 4)
    assert (config.temperature_height, config.temperature_width, config.dropout) == (7, 9, 0.1)
    config = demo.load_checkpoint(idea_research_file()).config
    assert (config.temperature_height, config.temperature_width, config.activation_function) == (20, 20, "prelu")


@pytest.mark.filterwarnings(EPS_WARNING)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_backbone_of_a_file(block, tmp_path):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 2, 1, 1], layer_type=block, out_features=["stage4"]
    )
    theirs = huggingface_model(backbone_config=backbone)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.warns(UserWarning, match="does not state nhead"):
        model = demo.load_checkpoint(tmp_path / "model.safetensors")
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert model.config.backbone_config.layer_type == block


def dropped(*names):
    return lambda state: {name: x for name, x in state.items() if not name.startswith(names)}


def only(beginning):
    return lambda state: {name: x for name, x in state.items() if name.startswith(beginning)}


@pytest.mark.parametrize(
    "edit, args, says",
    [
        (only("transformer.decoder."), {}, "must hold a whole model, but refpoint_embed.weight is missing"),
        (
            dropped("backbone."),
            {},
            "must hold a whole model with a ResNet, but backbone.0.body.conv1.weight is missing",
        ),
        (dropped("class_embed.bias"), {}, "does not fit the DabDetrForObjectDetection: missing class_embed.bias"),
        (lambda state: state, {"dilation": True}, "must have a backbone without dilation"),
        (lambda state: state, {"nheads": 5}, "must describe a decoder that there is: d_model must be a multiple"),
        (lambda state: {"weight": torch.ones(2)}, {}, "must hold a DAB-DETR state_dict of"),
    ],
)
def test_a_file_that_is_no_whole_model_is_one_line(edit, args, says, idea_research_file, photo, tmp_path):
    path = idea_research_file(edit, **args)
    result = invoke("demo", photo, "--checkpoint", path, "--output", tmp_path / "out.png")
    assert result.exit_code == 2 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "…" not in line]
    assert len(errors) == 1 and errors[0].startswith("dab-fast demo: --checkpoint ") and says in errors[0]


def test_default_photo_needs_no_download():
    image = demo.read_image(demo.default_image())
    assert min(image.size) == demo.SHORTER and max(image.size) <= demo.LONGER


@pytest.mark.parametrize("size, resized", [((300, 200), (240, 160)), ((100, 2000), (67, 1333)), ((1, 9999), (1, 1333))])
def test_resize(size, resized, tmp_path):
    Image.new("RGB", size).save(tmp_path / "image.png")
    assert demo.read_image(tmp_path / "image.png").size == resized


def test_random_model_has_every_parameter_drawn():
    """No zero and no one is left of the initialisation, queries differ, and boxes follow the photo."""
    tiny = huggingface_model().config
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 3, 96, 128, generator=generator)
    model = demo.random_model(tiny, pixels)
    for name, parameter in model.named_parameters():
        assert parameter.unique().numel() > 0.99 * parameter.numel(), name
        assert not ((parameter == 0) | (parameter == 1)).any(), name
    with torch.no_grad():
        boxes = model(pixels).pred_boxes
        mirrored = model(pixels.flip(-1)).pred_boxes
    assert boxes.std(1).min() > 0.02
    assert (boxes - mirrored).abs().max() > 1e-3
    again = demo.random_model(tiny, pixels)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def comparison(checkpoint):
    model = demo.load_checkpoint(checkpoint)
    image = Image.linear_gradient("L").resize((128, 96)).convert("RGB")
    result, _, _ = demo.run(image, "x", model, "y", device=torch.device("cpu"), dtype=torch.float32)
    assert not result.failures
    return result


@pytest.mark.parametrize(
    "change, says",
    [
        ({"max_box_difference_px": 0.051}, "boxes differ by 0.051 px, allowed are 0.05"),
        ({"max_box_difference_px": float("nan")}, "boxes differ by nan"),
        ({"max_logit_difference": 0.1}, "logits differ by 0.1"),
        ({"median_box_move_px": 0.5}, "moves boxes by 0.5 px only"),
        ({"stepped_aside": {"model.decoder": {"a hook": 3}}}, "model.decoder took its original forward: a hook"),
    ],
)
def test_every_failure_is_seen(comparison, change, says):
    (failure,) = dataclasses.replace(comparison, **change).failures
    assert says in failure


def test_a_model_that_steps_aside_fails(checkpoint, photo, tmp_path, monkeypatch):
    """Or the demo would compare the original with itself."""
    load = demo.load_checkpoint

    def hooked(path):
        model = load(path)
        model.model.decoder.layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: None)
        return model

    monkeypatch.setattr(demo, "load_checkpoint", hooked)
    result = invoke("demo", photo, "--checkpoint", checkpoint, "--output", tmp_path / "out.png")
    assert result.exit_code == 1 and "took its original forward" in result.stdout


def test_selftest_passes():
    result = invoke("selftest", "--device", "cpu")
    assert result.exit_code == 0, result.stdout
    for op in ("box_position_embed", "modulated_cross_attention", "refine_boxes"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert any(
                line.startswith("ok") and op in line and dtype in line and " torch " in line
                for line in result.stdout.splitlines()
            )
    assert "FAIL" not in result.stdout
    assert result.stdout.rstrip().endswith(str(dab_fast.build_info()))


@pytest.mark.parametrize("op", ["box_position_embed", "modulated_cross_attention", "refine_boxes"])
@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_selftest_can_fail(monkeypatch, op, wrong):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (1 + 1e-4 * (wrong == "output")) + float("nan") * (wrong == "nan")

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1 + 1e-4 * (wrong == "gradient"))

    example = next(x for x in examples() if x.op == op)

    def broken(**inputs):
        result = example.call(**inputs)
        return Wrong.apply(result) if isinstance(result, torch.Tensor) else (Wrong.apply(result[0]), *result[1:])

    monkeypatch.setattr(validation, "examples", lambda: [dataclasses.replace(example, call=broken)])
    result = invoke("selftest", "--device", "cpu")
    assert result.exit_code == 1 and "FAIL" in result.stdout


def test_selftest_sees_a_wrong_decoder(monkeypatch):
    class Wrong(DabDecoder):
        def forward(self, *args, **kwargs):
            hidden_states, reference_points = super().forward(*args, **kwargs)
            return hidden_states * 1.0001, reference_points

    monkeypatch.setattr(validation, "examples", list)
    monkeypatch.setattr(validation, "DabDecoder", Wrong)
    result = invoke("selftest", "--device", "cpu")
    assert result.exit_code == 1 and "FAIL  decoder" in result.stdout


def test_selftest_sees_a_backend_that_did_not_run(monkeypatch):
    example = next(x for x in examples() if x.op == "refine_boxes")
    monkeypatch.setattr(validation, "examples", lambda: [dataclasses.replace(example, call=example.specification)])
    result = invoke("selftest", "--device", "cpu")
    assert result.exit_code == 1
    assert any(line.startswith("FAIL") and "triton" in line for line in result.stdout.splitlines())


def test_times_of_a_busy_machine_are_marked(comparison):
    calm = dataclasses.replace(comparison, rounds=3, times_vary=1.4)
    assert not calm.busy
    assert dataclasses.replace(calm, rounds=2).busy and dataclasses.replace(calm, times_vary=1.6).busy


def test_bench_passes_its_options_on(monkeypatch, tmp_path):
    import dab_fast.bench

    def recorded(*args):
        args[-1](repr(args[:-1]))
        return 1

    monkeypatch.setattr(dab_fast.bench, "bench", recorded)
    result = invoke("bench", "--only", "op", "--device", "cpu", "--seconds", "2", "--csv", tmp_path / "rows.csv")
    assert result.exit_code == 1
    assert f"(False, 'op', 'cpu', {tmp_path / 'rows.csv'!r}, 2.0)" in result.stdout
    bad = invoke("bench", "--csv", "nowhere/rows.csv", "--device", "cpu")
    assert bad.exit_code == 2 and "--csv must lie in" in bad.stderr


@pytest.mark.sweep
@pytest.mark.parametrize("wreck, code", [(False, 0), (True, 1)])
def test_full_size(wreck, code, tmp_path):
    """What `make demo` runs: DAB-DETR-R50 at 800 pixels."""
    command = [sys.executable, "-c", "from dab_fast.cli.main import main; main()", "demo", "--json"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out.png"), *["--wreck"] * wreck]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] == (code == 0) and found["size"] == [1200, 800] and found["tokens"] == 950
    assert (found["max_box_difference_px"] <= accuracy.DEMO_BOX_PX) == (code == 0)


def test_the_caught_call_is_the_one_that_the_fast_model_makes(checkpoint):
    """A hook would be seen, and the call would be the original's."""
    model = demo.load_checkpoint(checkpoint)
    dab_fast.accelerate(model)
    with torch.no_grad():
        _, calls = by_parts.run_and_catch(model, torch.randn(1, 3, 96, 128))
    call = calls["decoder"]
    assert call.keywords["spatial_shape"] == (3, 4) and call.keywords["memory_key_padding_mask"] is None
