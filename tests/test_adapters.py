"""A codebase touches one folder and one name, and its names of tensors lead to every other's."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import dab_fast
from dab_fast.adapters import ADAPTERS
from tests.support.idea_second_model import Model
from tests.support.models import huggingface_model

PACKAGE = Path(dab_fast.__file__).parent
CODEBASES = {name: importlib.import_module(f"dab_fast.adapters.{name}.checkpoint") for name in ADAPTERS}

# Files outside the folders that may name a codebase, and why.
ALLOWED = {
    "adapters/__init__.py": "the one name",
    "idea_research.py": "the import that users write",
    "bench/": "the peers that are timed are Hugging Face's",
    "cli/demo.py": "the original that is shown beside its accelerated copy is Hugging Face's",
}


def normal(text: str) -> str:
    return re.sub(r"[-_ ]", "", text).lower()


WORDS = {name: {normal(name), normal(codebase.CODEBASE)} for name, codebase in CODEBASES.items()}
WORDS["huggingface"].add("transformers")


def words_of_code(source: str) -> list[str]:
    """Every identifier and string of a file, without comments and docstrings."""
    tree = ast.parse(source)
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    docstrings = {id(value) for value in statements if isinstance(value, ast.Constant)}
    found = []
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            found += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
    return found


def codebases_named(source: str) -> set[str]:
    texts = [normal(text) for text in words_of_code(source)]
    return {name for name, words in WORDS.items() if any(word in text for text in texts for word in words)}


def test_no_other_file_names_a_codebase():
    named = {}
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE).as_posix()
        its_own = {name for name in ADAPTERS if path.startswith(f"adapters/{name}/")}
        if not path.startswith(tuple(ALLOWED)) and (
            others := codebases_named(file.read_text(encoding="utf-8")) - its_own
        ):
            named[path] = others
    assert named == {}


@pytest.mark.parametrize("path", ALLOWED)
def test_what_is_allowed_is_needed(path):
    files = PACKAGE.joinpath(path).rglob("*.py") if path.endswith("/") else [PACKAGE / path]
    assert any(codebases_named(file.read_text(encoding="utf-8")) for file in files)


@pytest.mark.parametrize(
    "source, names",
    [
        ("from dab_fast.adapters import huggingface", {"huggingface"}),
        ("import transformers.models", {"huggingface"}),
        ("x = f'of Hugging Face, {y}'", {"huggingface"}),
        ("def f(idea_research): pass", {"idea_research"}),
        ("x.IDEA_Research", {"idea_research"}),
        ('"""Hugging Face"""\nx = 1  # Hugging Face', set()),
    ],
)
def test_a_name_in_code_is_seen(source, names):
    assert codebases_named(source) == names


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_what_its_description_lists(name):
    adapter, codebase = importlib.import_module(f"dab_fast.adapters.{name}"), CODEBASES[name]
    lists = re.findall(
        r"(?:^    [A-Za-z_]+\b.*\n(?:^     .*\n)*)+", importlib.import_module("dab_fast.adapters").__doc__, re.M
    )
    described = [re.findall(r"^    ([A-Za-z_]+)", block, re.M) for block in lists]
    assert [len(names) for names in described] == [2, 8]
    for module, names in zip((adapter, codebase), described, strict=True):
        assert [x for x in names if not hasattr(module, x)] == []
    assert codebase.INVERSE_SIGMOID_EPS == adapter.INVERSE_SIGMOID_EPS


def test_huggingfaces_names_there_and_back():
    """Through the names of IDEA-Research's model, to either kind of backbone; timm is no dependency, so a stand-in."""
    huggingface, idea_research = CODEBASES["huggingface"], CODEBASES["idea_research"]
    plain, timm = huggingface_model(), huggingface_model()
    timm.model.backbone.conv_encoder.model._backbone = None
    state = plain.state_dict()
    canonical = huggingface.to_canonical(state, "model.decoder.")
    assert canonical.keys() == idea_research.to_canonical(Model().state_dict(), "transformer.decoder.").keys()
    timms = huggingface.from_canonical(canonical, timm)
    assert "model.backbone.conv_encoder.model._backbone.layer2.0.downsample.1.running_var" in timms
    for saved in (state, timms):
        again = huggingface.from_canonical(huggingface.to_canonical(saved, "model.decoder."), plain)
        torch.testing.assert_close(again, dict(state), rtol=0, atol=0)
