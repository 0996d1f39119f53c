"""The measuring code: counts against the committed baseline, rows, gates, and the commands that the docs name."""

from __future__ import annotations

import json
import warnings

import pytest

from benchmarks import counts
from dab_fast.bench.counting import METRICS, decoder_counts
from dab_fast.bench.workloads import TINY

UPDATE = "`python -m benchmarks.counts --write-baseline` after a change that is meant"


def numbers(found):
    return {
        (tokens, provider, mode, metric): number
        for tokens, providers in found.items()
        for provider, modes in providers.items()
        for mode, metrics in modes.items()
        for metric, number in metrics.items()
    }


def test_counts_do_not_rise():
    baseline = json.loads(counts.BASELINE.read_text())
    if baseline["versions"] != counts.versions():
        pytest.skip(f"the baseline is of {baseline['versions']}, here is {counts.versions()}")
    ours, committed = numbers(decoder_counts()), numbers(baseline["counts"])
    worse = {key: (committed[key], number) for key, number in ours.items() if number > committed.get(key, number)}
    assert not worse, f"(committed, now): {worse}; {UPDATE}"
    if ours != committed:
        warnings.warn(f"the counts differ from the committed ones: {UPDATE}", stacklevel=1)


def test_counts_say_less_than_the_original():
    committed = json.loads(counts.BASELINE.read_text())["counts"]
    for tokens in ("1050", "4200"):
        theirs = committed[tokens]["huggingface"]
        for provider in committed[tokens].keys() - {"huggingface"}:
            for mode, ours in committed[tokens][provider].items():
                launches = ours["aten_calls"] + ours["kernel_launches"]
                assert launches < theirs[mode]["aten_calls"]
                assert ours["host_syncs"] == 0 < theirs[mode]["host_syncs"]
                assert ours["saved_bytes"] <= theirs[mode]["saved_bytes"]


def test_counts_form():
    found = decoder_counts((1050,), TINY)
    assert found.keys() == {"1050"}
    assert {"huggingface", "torch"} <= found["1050"].keys()
    for modes in found["1050"].values():
        assert modes.keys() <= {"inference", "training"}
        for metrics in modes.values():
            assert tuple(metrics) == METRICS
            assert all(type(number) is int for number in metrics.values())


def test_counts_command(capsys, monkeypatch):
    monkeypatch.setattr(counts, "decoder_counts", lambda tokens: decoder_counts(tokens, TINY))
    counts.main(["--json", "--tokens", "1050"])
    assert json.loads(capsys.readouterr().out) == decoder_counts((1050,), TINY)
    counts.main(["--tokens", "1050"])
    assert "aten_calls" in capsys.readouterr().out
