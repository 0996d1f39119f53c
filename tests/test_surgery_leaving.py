"""NaN is not swallowed; restore() and an accelerated model's class under other libraries; the demo's pictures."""

from __future__ import annotations

import copy
import functools
import math
import types
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dab_fast
from dab_fast import ops
from dab_fast.cli import demo
from tests.support.surgery import (
    accelerate,
    assert_same,
    attempt,
    huggingface,
    huggingface_decoder,
    idea,
    run_huggingface_decoder,
    run_idea_decoder,
    run_model,
)

B, Q, S, H, WIDTH = 2, 3, 5, 2, 16
BAD = [math.nan, math.inf, -math.inf]


def attention_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {"q_content": Q, "q_pos": Q, "k_content": S, "k_pos": S, "v": S}
    return {name: torch.randn(B, n, H, WIDTH, generator=generator) for name, n in rows.items()}


def plain_attention(q_content, q_pos, k_content, k_pos, v, key_padding_mask=None):
    q, k = torch.cat((q_content, q_pos), -1), torch.cat((k_content, k_pos), -1)
    logits = torch.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(q.shape[-1])
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], -math.inf)
    return torch.einsum("bhqs,bshd->bqhd", logits.softmax(-1), v)


def assert_same_kind(ours: Tensor, theirs: Tensor) -> None:
    """NaN and infinities where they are in the specification, and close elsewhere."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["q_content", "q_pos", "k_content", "k_pos", "v"])
def test_attention_does_not_swallow_what_is_not_finite(name, bad, padded, grad, backend):
    given = attention_inputs()
    given[name][0, 1, 1, 3] = bad
    mask = {"key_padding_mask": torch.arange(S).expand(B, S) >= S - 2} if padded else {}
    given = {key: x.requires_grad_(grad) for key, x in given.items()}
    with ops.backend(backend):
        found = dab_fast.modulated_cross_attention(**given, **mask)
    expected = plain_attention(**given, **mask)
    assert expected.isnan().any() or not math.isnan(bad), "a key's logit of -inf is no more than a weight of zero"
    assert_same_kind(found, expected)
    if grad and backend == "torch":
        gradients = [torch.autograd.grad(out.sum(), list(given.values())) for out in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.equal(ours.isnan().any(), theirs.isnan().any())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_with_an_overflowing_logit(backend):
    given = attention_inputs()
    given["q_content"][0, 1] = given["k_content"][0, 1] = 1e30
    with ops.backend(backend):
        assert_same_kind(dab_fast.modulated_cross_attention(**given), plain_attention(**given))


@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
@pytest.mark.parametrize("bad", BAD[:2])
@pytest.mark.parametrize("where", ["content", "memory", "weight", "bias"])
def test_decoders_do_not_swallow_what_is_not_finite(where, bad, codebase):
    """So that a guard that asks whether the loss is finite stops the step that the original's would stop."""
    base, run = (idea(), run_idea_decoder) if codebase == "idea" else (huggingface_decoder(), run_huggingface_decoder)
    theirs = copy.deepcopy(base)
    layer = theirs.layers[1]
    value = layer.ca_v_proj if codebase == "idea" else layer.cross_attn.cross_attn_value_proj
    query = layer.ca_qcontent_proj if codebase == "idea" else layer.cross_attn.cross_attn_query_content_proj
    with torch.no_grad():
        if where == "weight":
            value.weight[3, 4] = bad
        elif where == "bias":
            query.bias[3] = bad
    if where in ("content", "memory"):
        position = {("content", "idea"): 0, ("memory", "idea"): 1, ("content", "huggingface"): 0}.get(
            (where, codebase), 1
        )

        def spoil(module: Any, args: Any, kwargs: Any) -> Any:
            name = list(kwargs)[position]
            x = kwargs[name].clone()
            x[1, 1, 2] = bad
            return args, kwargs | {name: x}

        theirs.register_forward_pre_hook(spoil, with_kwargs=True)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    with torch.no_grad():
        found, expected = ({k: x for k, x in run(d, False).items() if k[:2] != "d_"} for d in (ours, theirs))
    assert not all(x.isfinite().all() for x in expected.values())
    for name, x in expected.items():
        assert torch.equal(found[name].isfinite(), x.isfinite()), name


def closure(module: nn.Module) -> None:
    found = module.forward
    module.forward = lambda *args, **kwargs: found(*args, **kwargs)


def method(module: nn.Module) -> None:
    module.old = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: self.old(*args, **kwargs), module)


def partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


def autocast(module: nn.Module) -> None:
    module.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(module.forward)


def hooked(module: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(module, AlignDevicesHook("cpu"))


WRAPPERS = [closure, method, partial, autocast, hooked]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", ["", "model", "model.decoder"])
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("order", ["restore first", "unwrap first", "accelerate again"])
def test_restore_of_a_wrapped_model(wrap, path, order):
    model = copy.deepcopy(huggingface())
    expected = attempt(run_model, model)
    classes = [type(m) for m in model.modules()]
    dab_fast.accelerate(model)
    module = model.get_submodule(path)
    found = vars(module).get("forward")
    wrap(module)

    def unwrap() -> None:
        if wrap is hooked:
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(module)
        elif found is None:
            module.__dict__.pop("forward")

    assert_same(attempt(run_model, model), expected)
    if order == "unwrap first":
        unwrap()
        assert_same(attempt(run_model, model), expected)
    dab_fast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert_same(attempt(run_model, model), expected)
    if order == "restore first":
        unwrap()
        assert_same(attempt(run_model, model), expected)
    with suppress(ValueError):  # all is wrapped
        dab_fast.accelerate(model)
    assert_same(attempt(run_model, model), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_restore_of_a_wrapped_idea_decoder(wrap):
    decoder = copy.deepcopy(idea())
    expected = attempt(run_idea_decoder, decoder)
    dab_fast.accelerate(decoder)
    wrap(decoder)
    assert_same(attempt(run_idea_decoder, decoder), expected)
    dab_fast.restore(decoder)
    assert_same(attempt(run_idea_decoder, decoder), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", ["", "model", "model.decoder"])
@pytest.mark.parametrize("build", ["config", "from_pretrained", "_from_config", "new"])
def test_building_through_the_instances_class(build, path, tmp_path):
    """As EMA teachers are built."""
    model = copy.deepcopy(huggingface())
    dab_fast.accelerate(model)
    student: Any = model.get_submodule(path)
    if build == "from_pretrained":
        student.save_pretrained(tmp_path)
        teacher = type(student).from_pretrained(tmp_path).eval()
    elif build == "new":
        kind: Any = type(student)
        teacher = kind.__new__(kind)
        teacher.__init__(student.config)
    else:
        teacher = (type(student) if build == "config" else type(student)._from_config)(student.config)
    if path == "model.decoder":
        teacher.bbox_embed = copy.deepcopy(student.bbox_embed)
    elif path == "model":
        teacher.decoder.bbox_embed = copy.deepcopy(student.decoder.bbox_embed)
    teacher.load_state_dict(student.state_dict())
    teacher.eval()
    run = run_huggingface_decoder if path == "model.decoder" else run_model if not path else run_bare_model
    expected = attempt(run, student)
    assert expected.error is None
    assert_same(attempt(run, teacher), expected)
    with torch.no_grad():
        steps_aside = {"output_attentions": True} if path != "model.decoder" else {}
        if steps_aside:
            teacher(torch.zeros(1, 3, 64, 64), **steps_aside)
    dab_fast.accelerate(teacher)
    assert_same(attempt(run, teacher), expected)
    dab_fast.restore(teacher)
    assert_same(attempt(run, teacher), expected)


def run_bare_model(model: Any, padded: bool) -> dict[str, Tensor]:
    out = model(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    return {"states": out.intermediate_hidden_states, "references": out.reference_points}


@pytest.mark.usefixtures("float64")
def test_building_an_idea_decoder_through_its_class():
    student = copy.deepcopy(idea())
    dab_fast.accelerate(student)
    teacher = type(student)(copy.deepcopy(student.layers[0]), 3, 32, 4)
    teacher.bbox_embed = copy.deepcopy(student.bbox_embed)
    for i, layer in enumerate(student.layers):
        teacher.layers[i] = copy.deepcopy(layer)
    teacher.load_state_dict(student.state_dict())
    teacher.eval()
    assert_same(attempt(run_idea_decoder, teacher), attempt(run_idea_decoder, student))
    dab_fast.accelerate(teacher)
    assert_same(attempt(run_idea_decoder, teacher), attempt(run_idea_decoder, student))


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def another_class_on_top(module: nn.Module) -> type:
    """As fully_shard, torch's parametrizations and others do it."""
    module.__class__ = type(f"Wrapped{type(module).__name__}", (type(module),), {"wrapped": True})
    return type(module)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", ["", "model.decoder"])
@pytest.mark.parametrize("wrap", ["fully_shard", "another class", "parametrize"])
def test_restore_under_another_librarys_class(wrap, path, mesh):
    """It takes off what accelerate put on and nothing else, or refuses, and says which class is in the way."""
    model = copy.deepcopy(huggingface())
    expected = attempt(run_model, copy.deepcopy(model))
    dab_fast.accelerate(model)
    module = model.get_submodule(path)
    if wrap == "fully_shard":
        fully_shard(module, mesh=mesh)
    elif wrap == "another class":
        another_class_on_top(module)
    else:
        module.register_parameter("extra", nn.Parameter(torch.ones(2)))
        nn.utils.parametrize.register_parametrization(module, "extra", nn.Identity())
    on_top = type(module)
    with pytest.raises(RuntimeError, match=f"{on_top.__name__}|class"):
        dab_fast.restore(model)
    assert type(module).__name__ == on_top.__name__, "the other library's class stays"
    with torch.no_grad():
        found = run_model(model, False)
    for name, x in expected.outputs.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=2e-5)
    if wrap == "fully_shard":
        sum(x.sum() for x in run_model(model, False).values()).backward()
        assert all(hasattr(p.grad, "full_tensor") for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(orientation, tmp_path):
    """Orientation 6 and its like swap height and width; a viewer shows the picture upright."""
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste("white", (0, 0, 20, 20))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    found = demo.read_image(tmp_path / "photo.png")
    assert found.width > found.height
    w, h = found.size
    assert found.getpixel((w // 6, h // 4))[0] > 200 and found.getpixel((w * 5 // 6, h * 3 // 4))[0] < 50


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_a_photo_of_any_mode_keeps_its_greys(mode, tmp_path):
    """A ramp from black to white stays one."""
    ramp = Image.linear_gradient("L")  # [256, 256], black above, white below
    if mode == "I;16":
        image = Image.frombytes("I;16", ramp.size, b"".join(bytes((0, x)) for x in ramp.tobytes()))
    elif mode == "I":
        image = ramp.convert("I").point(lambda x: x * 256)
    else:
        image = ramp.convert(mode)
    path = tmp_path / ("photo.tiff" if mode in ("F", "CMYK", "I") else "photo.png")
    image.save(path)
    found = demo.read_image(path)
    greys = [found.getpixel((found.width // 2, int(found.height * x)))[0] for x in (0.02, 0.5, 0.97)]
    assert greys[0] < 60 and greys[2] > 195
    assert mode == "1" or 90 < greys[1] < 165
