"""What is folded into the backbone's convolutions is never stale, and nothing of it is copied or saved."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dab_fast
from dab_fast.parts import folding
from tests.support.backbone import assert_close, assert_same, encoder, pair, pixels
from tests.support.models import assert_same_gradients


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether tensors are added up one by one, as on a CPU, or a few at once, as on a GPU."""
    if request.param == "gpu":
        monkeypatch.setitem(folding.WORDS_AT_ONCE, "cpu", 1 << 13)  # several times, of so small a network


def _data_copy(module: nn.Module) -> None:
    for p in module.parameters():
        p.data.copy_(p.data * 1.5)


def _data_swap(module: nn.Module) -> None:
    """The same numbers in another order."""
    for p in module.parameters():
        p.data.copy_(p.data.flip(0).clone())


def _one_bit(module: nn.Module) -> None:
    weight = next(p for name, p in module.named_parameters() if "stages.3" in name).data
    weight.view(torch.int32).view(-1)[7] ^= 1 << 29


def _replaced(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 0.5


def _buffers(module: nn.Module) -> None:
    for name, x in module.named_buffers():
        if name.endswith("running_var"):
            x.mul_(2.0)


def _buffers_data(module: nn.Module) -> None:
    for name, x in module.named_buffers():
        if name.endswith("running_mean"):
            x.data.add_(1.0)


def _loaded(module: nn.Module) -> None:
    module.load_state_dict({name: x * 0.7 for name, x in module.state_dict().items()})


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({name: x * 0.7 for name, x in module.state_dict().items()}, assign=True)


def _stepped(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    with torch.enable_grad():
        module(*pixels())[0][0].square().mean().backward()
    optimizer.step()


def _inference_write(module: nn.Module) -> None:
    with torch.inference_mode():
        for p in module.parameters():
            p.mul_(0.9)


CHANGES = [
    _data_copy,
    _data_swap,
    _one_bit,
    _replaced,
    _buffers,
    _buffers_data,
    _loaded,
    _assigned,
    _stepped,
    _inference_write,
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_never_stale(change: Callable[[nn.Module], None], grad: bool):
    ours, theirs = pair()
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            before = ours(*pixels())[0][0]
        for module in (ours, theirs):
            with torch.no_grad():
                change(module)
        assert not torch.equal(before, theirs(*pixels())[0][0])
        for _ in range(3):
            assert_same(ours, theirs, *pixels())


def test_rows_that_change_places_are_seen():
    """Of a tensor so large that its bits are added up."""
    x, owner = torch.randn(128, 512), nn.Identity()
    first = folding.derived(owner, "it", [x], x.clone)
    assert folding.derived(owner, "it", [x], x.clone) is first
    x.data[:2] = x.data[:2].flip(0).clone()
    assert torch.equal(folding.derived(owner, "it", [x], x.clone), x)


def test_ema():
    ours, theirs = pair()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in (ours, theirs)]
    for _ in range(3):
        for module, average in zip((ours, theirs), averages, strict=True):
            _stepped(module)
            average.update_parameters(module)
        with torch.no_grad():
            for (x, _), (right, _) in zip(averages[0](*pixels()), averages[1](*pixels()), strict=True):
                # Two trained networks: optimizers divide by gradients, whose rounding then shows.
                torch.testing.assert_close(x, right, rtol=0, atol=1e-2 * right.abs().max().item())
            plain = copy.deepcopy(averages[0].module)
            dab_fast.restore(plain)
            assert_same(averages[0].module, plain, *pixels())


def test_functional_call():
    ours, theirs = pair()
    other = {name: x * 0.8 for name, x in theirs.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            assert_same(ours, theirs, *pixels())
            got = torch.func.functional_call(ours, other, pixels())[0][0]
            assert_close(got, torch.func.functional_call(theirs, other, pixels())[0][0])


@pytest.mark.usefixtures("float64")
def test_inference_mode():
    with torch.inference_mode():
        ours, theirs = pair()  # of tensors that have no version
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
        for module in (ours, theirs):
            for p in module.parameters():
                p.mul_(0.9)
        assert_same(ours, theirs, *pixels())
    ours, theirs = pair()
    with torch.inference_mode():
        assert_same(ours, theirs, *pixels())
    for module in (ours, theirs):
        module(*pixels())[0][0].sum().backward()  # nothing that was kept is a tensor of inference mode
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs)))


def test_threads():
    ours, theirs = pair()
    given = [(torch.randn(1, 3, size, 64), torch.ones(1, size, 64)) for size in (32, 64, 96, 64)]
    with torch.no_grad():
        expected = [theirs(*x)[0][0] for x in given]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_close(ours(*given[i])[0][0], expected[i])
                    dab_fast.refresh(ours)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_on_a_gpu_the_answer_comes_at_the_next_call(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A GPU's answer stands in a flag that the next call reads; here the flag is the CPU's."""
    monkeypatch.setattr(folding, "_waits_for", lambda device: False)
    monkeypatch.setattr(folding, "_is_capturing", lambda device: False)
    monkeypatch.setattr(folding, "_later", lambda flag: lambda: bool(flag))
    monkeypatch.setattr(folding, "_warned", False)
    ours, theirs = pair()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "dab_fast"):
        for _ in range(3):
            assert_same(ours, theirs, *pixels())
        for module in (ours, theirs):
            _data_copy(module)
        ours(*pixels())
        assert "dab_fast.refresh" not in caplog.text
        assert_same(ours, theirs, *pixels())
        assert caplog.text.count("dab_fast.refresh") == 1
        for module in (ours, theirs):
            _data_copy(module)
        dab_fast.refresh(ours)
        assert_same(ours, theirs, *pixels())
        assert caplog.text.count("dab_fast.refresh") == 1


def test_nothing_folded_is_copied_saved_or_kept_too_long():
    ours, theirs = pair()
    with torch.no_grad():
        ours(*pixels())
    assert folding.kept(ours).nbytes() > 0
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert folding.kept(copy.deepcopy(ours)) is None
    loaded = pickle.loads(pickle.dumps(ours))
    assert type(loaded) is type(theirs)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert len(buffer.getvalue()) < 1.1 * sum(x.nbytes for x in ours.state_dict().values()) + 200_000
    for leave in (lambda: ours.train().eval(), lambda: ours.to(torch.float32), lambda: dab_fast.refresh(ours)):
        with torch.no_grad():
            ours(*pixels())
        leave()
        assert folding.kept(ours) is None
    with torch.no_grad():
        ours(*pixels())
    dab_fast.restore(ours)
    assert folding.kept(ours) is None
    assert type(ours) is type(theirs)
    assert torch.equal(ours(*pixels())[0][0], theirs(*pixels())[0][0])


def test_the_report_says_how_much_memory_is_kept():
    ours = encoder()
    report = dab_fast.accelerate(ours)
    assert "folded" not in str(report)
    with torch.no_grad():
        ours(*pixels())
    assert "MB of folded weights" in str(report)
