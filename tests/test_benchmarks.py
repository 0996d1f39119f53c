"""The measuring code: counts against the committed baseline, rows, gates, and the commands that the docs name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import counts, roofline
from dab_fast import ops
from dab_fast.bench import bench, hardware, rows
from dab_fast.bench.cases import Case, cases, measure_case
from dab_fast.bench.counting import METRICS, decoder_counts
from dab_fast.bench.providers import PROVIDERS
from dab_fast.bench.roofline import decoder_stages, floor_ms, floor_seconds
from dab_fast.bench.workloads import ONE_IMAGE, TINY, WORKLOADS, Decoder, Shape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Shape(batch=2, queries=9, height=5, width=7)

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


def row(**more):
    return {column: "" for column in rows.COLUMNS} | {"provider": "torch", "p50_ms": 2.0, "error": 1e-6} | more


def test_rows_are_never_overwritten_silently(tmp_path):
    path = tmp_path / "results" / "a.csv"
    assert rows.append(path, [row(), row(provider="triton")]) == []
    assert [r["provider"] for r in rows.read(path)] == ["torch", "triton"]
    again = row(p50_ms=1.0)
    assert rows.append(path, [again, row(date="2001-01-01")]) == [again]
    assert [r["p50_ms"] for r in rows.read(path)] == ["2", "2", "2"]
    assert rows.append(path, [again], replace=True) == []
    assert [r["p50_ms"] for r in rows.read(path)] == ["1", "2", "2"]
    with pytest.raises(ValueError, match="rows must have the columns"):
        rows.append(path, [{"speed": 1}])


@pytest.mark.parametrize("column", rows.KEY)
def test_every_part_of_the_key_makes_another_row(tmp_path, column):
    path = tmp_path / "a.csv"
    assert rows.append(path, [row(), row(**{column: "other"})]) == []
    assert len(rows.read(path)) == 2


def test_accuracy_gate():
    assert rows.accurate(1e-6, 1e-6, "fp32")
    assert rows.accurate(2e-3, 1e-3, "fp32")
    assert not rows.accurate(2.1e-3, 1e-3, "fp32")
    assert not rows.accurate(None, 1e-3, "fp32")
    assert not rows.accurate(1e-6, None, "fp32")
    assert not rows.accurate(float("nan"), 1e-3, "fp32")


def test_a_wrong_provider_gets_no_speedup(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.001 * original(*args, **kwargs)

    case = Case("modulated_cross_attention", "forward", SMALL, size=TINY, without=("compile",))
    original = ops.modulated_cross_attention
    monkeypatch.setattr(ops, "modulated_cross_attention", wrong)
    result = measure_case(case, CPU, rounds=2)
    by_name = {r["provider"]: r for r in result.rows}
    assert by_name["eager"]["accurate"] and by_name["eager"]["speedup"] == 1
    assert not by_name["torch"]["accurate"] and by_name["torch"]["speedup"] is None
    assert 5e-4 < by_name["torch"]["error"] < 2e-3
    shown = next(line for line in rows.table(result.rows).splitlines() if line.strip().startswith("torch"))
    assert "inexact" in shown and "x " not in shown.replace("inexact ", "")


def test_a_wrong_gradient_gets_no_speedup(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return 1.001 * g

    original = ops.refine_boxes
    monkeypatch.setattr(ops, "refine_boxes", lambda hidden, *args, **kw: original(Wrong.apply(hidden), *args, **kw))
    result = measure_case(Case("refine_boxes", "both", SMALL, size=TINY, without=("compile",)), CPU, rounds=1)
    by_name = {r["provider"]: r for r in result.rows}
    assert not by_name["torch"]["accurate"] and by_name["eager"]["accurate"]


def test_a_failing_provider_ends_no_other(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(ops, "refine_boxes", fail)
    result = measure_case(Case("refine_boxes", "forward", SMALL, size=TINY, without=("compile",)), CPU, rounds=1)
    assert [r["provider"] for r in result.rows] == ["eager"]
    assert str(result.failed["torch"]) == "no"


def test_times_of_the_interpreter_are_not_taken():
    case = Case("box_position_embed", "forward", SMALL, size=TINY, without=("compile",))
    result = measure_case(case, CPU, rounds=1)
    triton = next(r for r in result.rows if r["provider"] == "triton")
    assert triton["accurate"] and triton["kernel_launches"] == 1
    assert "p50_ms" not in triton and "speedup" not in triton


def test_a_provider_that_cannot_says_why():
    for provider in PROVIDERS.values():
        for kind in provider.kinds:
            reason = provider.why_not(WORKLOADS[kind](device=CPU))
            assert reason is None or reason
    assert PROVIDERS["compile_max"].why_not(Decoder()) == "needs a CUDA GPU"


def test_the_decoders_boxes_move():
    work = Decoder(SMALL, size=TINY)
    hidden_states, references = work.original().forward()
    assert (references[-1] - references[0]).abs().mean() > 1e-3
    assert (work.comparable((hidden_states, references)) - references[-1]).abs().mean() > 1e-3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("level", ["tiny", "default", "full"])
def test_cases_are_distinct_and_have_a_baseline(device, level):
    found = cases(torch.device(device), level)
    assert len(found) == len({(str(case), case.size) for case in found})
    for case in found:
        assert case.mode == "host" or case.mode in WORKLOADS[case.kind].modes
        assert case.providers()[0].name == WORKLOADS[case.kind].baseline


def test_bench(monkeypatch, tmp_path):
    tiny = [case for case in cases(CPU, "tiny") if case.kind == "refine_boxes"]
    monkeypatch.setattr("dab_fast.bench.cases.cases", lambda device, level: tiny)
    said = []
    path = tmp_path / "a.csv"
    assert bench(only="forward", device="cpu", csv=path, seconds=0.0, echo=said.append) == 0
    assert {r["mode"] for r in rows.read(path)} == {"forward"}
    assert any("refine_boxes forward" in line for line in said)
    assert bench(only="backwards", device="cpu", echo=said.append) == 1


def test_floor_is_below_every_prediction_and_above_the_bytes():
    for gpu in hardware.GPUS:
        for case in roofline.predict(gpu):
            floor = case["predicted_ms"].pop("floor")
            assert case["predicted_ms"]
            assert all(floor < ms for ms in case["predicted_ms"].values())
            assert floor >= (1 - 1e-9) * 1e3 * case["mbytes"] * 1e6 / gpu.hbm


def test_floating_point_operations_are_those_of_the_decoder():
    """Counted by PyTorch; ours computes the position keys from h + w rows and merges no GEMM away."""
    from torch.utils.flop_counter import FlopCounterMode

    work = Decoder(ONE_IMAGE)
    prepared = work.original()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prepared.forward()
    ours = sum(s.times * s.flops for s in decoder_stages(ONE_IMAGE))
    position_keys = 2 * 1050 * 256 * 256 * 6
    assert counter.get_total_flops() == pytest.approx(ours + position_keys, rel=0.03)


def test_floor_ms():
    expected = 1e3 * floor_seconds(decoder_stages(ONE_IMAGE), hardware.GPUS[0], "bf16")
    assert floor_ms("decoder", "inference", ONE_IMAGE, "bf16", "NVIDIA H100 80GB HBM3") == expected
    assert floor_ms("decoder", "inference", ONE_IMAGE, "bf16", "NVIDIA T4") is None
    assert floor_ms("model", "inference", ONE_IMAGE, "bf16", "NVIDIA H100") is None
    attention = floor_ms("modulated_cross_attention", "forward", ONE_IMAGE, "bf16", "NVIDIA H100")
    assert attention is not None and 0 < attention < expected


def test_roofline_command(capsys):
    roofline.main(["--stages"])
    shown = capsys.readouterr().out
    assert shown.startswith("Predicted, not measured") and "cross-attention" in shown
    roofline.main(["--json", "--gpu", "H200"])
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_measured_stands_beside_predicted(tmp_path, capsys):
    case = {"op": "decoder", "mode": "inference", "dtype": "bf16", "batch": 8, "queries": 300, "tokens": 1050}
    rows.append(tmp_path / "a.csv", [row(**case, padded=False, device="NVIDIA H100", p50_ms=0.77, commit="abc")])
    roofline.main(["--results", str(tmp_path)])
    assert "measured    0.770 at abc" in capsys.readouterr().out


def run(*command, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_benchmark_flag_times_and_adds_rows(tmp_path):
    """The flag is no abbreviation of pytest-benchmark's own."""
    command = ("-m", "pytest", "benchmarks/", "--benchmark", "--results", str(tmp_path), "--seconds", "0", "-q")
    done = run(sys.executable, *command, "-k", "refine_boxes and forward and not compile", TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.csv")
    found = {r["provider"]: r for r in rows.read(path)}
    assert {"eager", "torch"} <= found.keys()
    assert float(found["torch"]["p50_ms"]) > 0 and found["torch"]["accurate"] == "True"
    assert "rows added to" in done.stdout and "benchmark 'refine_boxes forward" in done.stdout
