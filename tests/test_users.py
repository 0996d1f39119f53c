"""What users do with an accelerated model, as they write it; each is fast, and gives the original's answers."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import DabDetrForObjectDetection

import dab_fast
from dab_fast import measure
from dab_fast.cli import demo
from tests.support import idea_models
from tests.support.models import assert_same_outputs, huggingface_model, images, labels

ROOT = Path(__file__).parents[1]


def model_and_twin() -> tuple[Any, Any, Any]:
    """The original, its accelerated twin, and the report."""
    model = huggingface_model()
    fast = copy.deepcopy(model)
    return model, fast, dab_fast.accelerate(fast)


def same(fast: Any, model: Any) -> None:
    with torch.no_grad():
        assert_same_outputs(fast.eval()(**images()), model.eval()(**images()))


def train(model: Any, steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = model.train()(**images(padded=True), labels=labels()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_plain_loop():
    model, fast, report = model_and_twin()
    assert train(fast) == pytest.approx(train(model), rel=1e-5)
    same(fast, model)
    assert not report.stepped_aside


@pytest.mark.sweep  # it needs 5 GB
def test_a_training_step_keeps_three_quarters():
    """The model as published, with its dropout, on two images of 800 x 1216."""
    pixels = torch.randn(2, 3, 800, 1216)
    model = demo.random_model(demo.resnet50_config(), pixels[:1]).train()
    fast = copy.deepcopy(model)
    dab_fast.accelerate(fast)
    target = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4) / 4 + 0.25} for _ in pixels]
    kept = [
        measure.saved_bytes(lambda m=m: m(pixels, labels=target).loss, [*m.parameters(), *m.buffers()])
        for m in (fast, model)
    ]
    assert kept[0] <= 0.75 * kept[1], kept


class Photos(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"pixel_values": images()["pixel_values"][i], "labels": labels()[i]}


def collate(photos):
    return {
        "pixel_values": torch.stack([photo["pixel_values"] for photo in photos]),
        "labels": [photo["labels"] for photo in photos],
    }


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, fast, report = model_and_twin()
    for m in (model, fast):
        arguments = TrainingArguments(
            tmp_path / m.__class__.__module__,
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=1e-4,
            optim="sgd",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(m, arguments, train_dataset=Photos(), data_collator=collate).train()
    same(fast, model)
    assert not report.stepped_aside


def test_accelerator():
    from accelerate import Accelerator

    model, fast, report = model_and_twin()
    for m in (model, fast):
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-4)
        prepared, optimizer = accelerator.prepare(m, optimizer)
        loss = prepared.train()(**images(), labels=labels()).loss
        accelerator.backward(loss)
        optimizer.step()
        assert accelerator.unwrap_model(prepared) is m
    same(fast, model)
    assert not report.stepped_aside


@pytest.mark.parametrize("average", ["deepcopy", "AveragedModel"])
def test_ema(average):
    model, fast, _ = model_and_twin()
    teachers = []
    for m in (model, fast):
        if average == "deepcopy":
            teacher = copy.deepcopy(m).requires_grad_(False)
            train(m)
            for p, q in zip(teacher.parameters(), m.parameters(), strict=True):
                p.lerp_(q.detach(), 0.1)
        else:
            teacher = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            train(m)
            teacher.update_parameters(m)
        teachers.append(teacher)
    same(teachers[1], teachers[0])
    assert not dab_fast.accelerate(teachers[1]).stepped_aside


@pytest.fixture
def no_input_embeddings(monkeypatch):
    """PEFT asks for them, and transformers 5.23 cannot say what DAB-DETR's are."""
    from transformers.models.dab_detr import modeling_dab_detr

    monkeypatch.setattr(
        modeling_dab_detr.DabDetrPreTrainedModel,
        "get_input_embeddings",
        lambda self: torch.nn.Embedding(1, 1),
        raising=False,
    )


def adapted(m: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(m, LoraConfig(target_modules=["fc1", "cross_attn_value_proj"], init_lora_weights=False))


def test_peft_adapters_and_their_merge(no_input_embeddings):
    model, fast, report = model_and_twin()
    wrapped, wrapped_fast = adapted(model), adapted(fast)
    same(wrapped_fast, wrapped)
    assert "lora" in str(report.stepped_aside["model.decoder"])
    merged, merged_fast = wrapped.merge_and_unload(), wrapped_fast.merge_and_unload()
    seen = report.stepped_aside
    same(merged_fast, merged)
    assert report.stepped_aside == seen


def test_peft_names_the_original_library(no_input_embeddings, tmp_path):
    _, fast, _ = model_and_twin()
    adapted(fast).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["parent_library"] == "transformers.models.dab_detr.modeling_dab_detr"
    assert config["auto_mapping"]["base_model_class"] == "DabDetrForObjectDetection"
    assert not any(b"dab_fast" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_classes_name_the_originals_modules():
    """What tools store of a class: its module and its name."""
    _, fast, _ = model_and_twin()
    for theirs in (DabDetrForObjectDetection, type(huggingface_model().model.decoder)):
        ours = type(fast if theirs is DabDetrForObjectDetection else fast.model.decoder)
        assert (ours.__module__, ours.__qualname__) == (theirs.__module__, theirs.__qualname__)
    decoder = idea_models.accelerated(idea_models.oracle())
    assert type(decoder).__module__ == "tests.support.idea_second_writing"


@pytest.mark.parametrize("dump", ["pickle", "torch.save"])
def test_pickles_load_without_dab_fast(dump, tmp_path):
    _, fast, _ = model_and_twin()
    data = io.BytesIO()
    (pickle.dump if dump == "pickle" else torch.save)(fast, data)
    assert b"dab_fast" not in data.getvalue()
    data.seek(0)
    again = pickle.load(data) if dump == "pickle" else torch.load(data, weights_only=False)
    assert type(again) is DabDetrForObjectDetection
    same(again, fast)


# They import no transformers, which takes seconds.
BOTH = """
import pickle, sys, torch
from tests.support import idea_second_writing as second

def run(decoder):
    randn = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return decoder(randn(3, 1, 8), randn(4, 1, 8), pos=randn(4, 1, 8), refpoints_unsigmoid=randn(3, 1, 4))
"""
NOTEBOOK = """
import cloudpickle, dab_fast

class TransformerDecoder(second.TransformerDecoder):
    pass

decoder = TransformerDecoder(second.TransformerDecoderLayer(8, 2, 12, 0.0, "prelu"), 2, 8, 4).eval()
report = dab_fast.accelerate(decoder)
torch.save(run(decoder), sys.argv[1] + ".pt")
assert report.replaced and not report.stepped_aside
open(sys.argv[1], "wb").write(cloudpickle.dumps(decoder))
"""
READER = """
for found, expected in zip(run(pickle.load(open(sys.argv[1], "rb"))), torch.load(sys.argv[1] + ".pt")):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
"""


def test_cloudpickle_of_a_notebooks_class_loads_elsewhere(tmp_path):
    pytest.importorskip("cloudpickle")
    for script in (NOTEBOOK, READER):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-c", BOTH + script, str(tmp_path / "decoder.pkl")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-500:]


def _worker(fast: Any, queue: Any) -> None:
    report = dab_fast.accelerate(fast)
    with torch.no_grad():
        boxes = fast(**images()).pred_boxes
    queue.put((boxes.tolist(), len(report.replaced), report.stepped_aside))


def test_spawned_workers():
    """A worker gets the original's class, and accelerates its own copy."""
    model, fast, _ = model_and_twin()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_worker, args=(fast, queue))
    process.start()
    boxes, replaced, stepped_aside = queue.get()
    process.join()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(boxes), model(**images()).pred_boxes, rtol=0, atol=5e-6)
    assert replaced == 5 and not stepped_aside
