"""The measuring code: counts against the committed baseline, rows, gates, and the commands that the docs name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import counts, predict
from dab_fast import ops
from dab_fast.bench import bench, hardware, rows
from dab_fast.bench import cases as cases_
from dab_fast.bench.cases import BenchmarkCase, cases, measure_case
from dab_fast.bench.counting import METRICS, decoder_counts, model_counts
from dab_fast.bench.predict import decoder_stages, floor_ms, floor_seconds
from dab_fast.bench.providers import PROVIDERS
from dab_fast.bench.workloads import ONE_IMAGE, PAPER, TINY, WORKLOADS, Decoder, Shape

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


def test_counts_say_less_than_the_original_and_do_not_rise():
    """The first under any versions, the second under those of the committed baseline."""
    found = {**decoder_counts(), "model": model_counts()}
    for subject, providers in found.items():
        theirs = providers["huggingface"]
        for provider in providers.keys() - {"huggingface"}:
            for mode, ours in providers[provider].items():
                launches = ours["aten_calls"] + ours["kernel_launches"]
                assert launches < theirs[mode]["aten_calls"]
                if subject == "model":  # whether folded weights are fresh is waited for on a CPU alone
                    assert ours["host_syncs"] <= 2 <= theirs[mode]["host_syncs"]
                else:
                    assert ours["host_syncs"] == 0 < theirs[mode]["host_syncs"]
                assert ours["saved_bytes"] <= theirs[mode]["saved_bytes"]
    baseline = json.loads(counts.BASELINE.read_text())
    if baseline["versions"] != counts.versions():
        return
    ours, committed = numbers(found), numbers(baseline["counts"])
    worse = {key: (committed[key], number) for key, number in ours.items() if number > committed.get(key, number)}
    assert not worse, f"(committed, now): {worse}; {UPDATE}"
    if ours != committed:
        warnings.warn(f"the counts differ from the committed ones: {UPDATE}", stacklevel=1)


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
    monkeypatch.setattr(counts, "model_counts", lambda: model_counts(TINY))
    counts.main(["--json", "--tokens", "1050"])
    assert json.loads(capsys.readouterr().out) == {**decoder_counts((1050,), TINY), "model": model_counts(TINY)}
    counts.main(["--tokens", "1050"])
    assert "aten_calls" in capsys.readouterr().out


def row(**more):
    return dict.fromkeys(rows.COLUMNS, "") | {"provider": "torch", "p50_ms": 2.0, "error": 1e-6} | more


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
    assert cases_.accurate(1e-6, 1e-6, "fp32")
    assert cases_.accurate(2e-3, 1e-3, "fp32")
    assert not cases_.accurate(2.1e-3, 1e-3, "fp32")
    assert not cases_.accurate(None, 1e-3, "fp32")
    assert not cases_.accurate(1e-6, None, "fp32")
    assert not cases_.accurate(float("nan"), 1e-3, "fp32")


def test_a_wrong_provider_gets_no_speedup(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.001 * original(*args, **kwargs)

    case = BenchmarkCase("modulated_cross_attention", "forward", SMALL, size=TINY, without=("compile",))
    original = ops.modulated_cross_attention
    monkeypatch.setattr(ops, "modulated_cross_attention", wrong)
    result = measure_case(case, CPU, rounds=2)
    by_name = {r["provider"]: r for r in result.rows}
    assert by_name["eager"]["accurate"] and by_name["eager"]["speedup"] == 1
    assert not by_name["torch"]["accurate"] and by_name["torch"]["speedup"] is None
    assert 5e-4 < by_name["torch"]["error"] < 2e-3
    shown = next(line for line in rows.table(result.rows).splitlines() if line.strip().startswith("torch"))
    assert "inexact" in shown and "x " not in shown.replace("inexact ", "")


def test_times_of_a_busy_machine_are_marked():
    calm = {"op": "a", "mode": "b", "batch": 1, "queries": 1, "tokens": 1, "padded": False, "dtype": "fp32"}
    calm |= {"accurate": True, "speedup": 1.0, "p20_ms": 2.0, "p80_ms": 2.1, "provider": "eager"}
    ours = calm | {"provider": "torch", "speedup": 2.0}
    assert "2.00x " in rows.table([calm, ours]) + " " and "~" not in rows.table([calm, ours])
    assert "2.00x~" in rows.table([calm | {"p80_ms": 4.0}, ours])
    assert "2.00x~" in rows.table([calm, ours | {"p80_ms": 4.0}])


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
    result = measure_case(BenchmarkCase("refine_boxes", "both", SMALL, size=TINY, without=("compile",)), CPU, rounds=1)
    by_name = {r["provider"]: r for r in result.rows}
    assert not by_name["torch"]["accurate"] and by_name["eager"]["accurate"]


def test_the_gate_of_gradients():
    """One relu unit on the other side of zero is chance; every gradient a little wrong, or one quite, is not."""
    output = torch.zeros(1)
    truth = {name: torch.full((100,), 1.0, dtype=torch.float64) for name in "abcde"}

    def found(**wrong):
        gradients = {name: (g * (1 + wrong.get(name, 1e-7))).float() for name, g in truth.items()}
        return cases_._errors(decoder, (output, gradients), (output, truth))

    decoder, op = BenchmarkCase("decoder", "training"), BenchmarkCase("modulated_cross_attention", "both")
    right, flip = found(), found(a=5e-3)
    assert flip["worst_error"] > 4e-3 and flip["error"] < 1e-6
    assert cases_._accurate(decoder, flip, right) and cases_._accurate(decoder, right, flip)
    assert not cases_._accurate(op, flip, right), "no relu is inside"
    assert not cases_._accurate(decoder, found(a=0.1), right)
    assert not cases_._accurate(decoder, found(**dict.fromkeys("abcde", 1e-4)), right)
    for name in "ae":
        assert not cases_._accurate(decoder, found(**{name: float("nan")}), right)
    assert not cases_._accurate(decoder, {}, right) and not cases_._accurate(decoder, right, {})


def test_a_failing_provider_ends_no_other(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(ops, "refine_boxes", fail)
    result = measure_case(
        BenchmarkCase("refine_boxes", "forward", SMALL, size=TINY, without=("compile",)), CPU, rounds=1
    )
    assert [r["provider"] for r in result.rows] == ["eager"]
    assert str(result.failed["torch"]) == "no"


def test_times_of_the_interpreter_are_not_taken():
    case = BenchmarkCase("box_position_embed", "forward", SMALL, size=TINY, without=("compile",))
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
        for case in predict.predict(gpu):
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


def test_predict_command(capsys):
    predict.main(["--stages"])
    shown = capsys.readouterr().out
    assert shown.startswith("Predicted, not measured") and "cross-attention" in shown
    predict.main(["--json", "--gpu", "H200"])
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_measured_stands_beside_predicted(tmp_path, capsys):
    case = {"op": "decoder", "mode": "inference", "dtype": "bf16", "batch": 8, "queries": 300, "tokens": 1050}
    rows.append(tmp_path / "a.csv", [row(**case, padded=False, device="NVIDIA H100", p50_ms=0.77, commit="abc")])
    predict.main(["--results", str(tmp_path)])
    assert "measured    0.770 at abc" in capsys.readouterr().out


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """benchmarks/on_gpu.sh --dry: every stage on a CPU, in the interpreter."""
    out = tmp_path_factory.mktemp("dry") / "out"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    script = ROOT / "benchmarks" / "on_gpu.sh"
    # Ten times what it takes on two idle cores: a busy machine may be slow, a hang is to end.
    done = subprocess.run(["bash", script, out, "--dry"], env=env, capture_output=True, text=True, timeout=1800)
    return done, out


def test_dry_run_does_every_stage(dry_run):
    done, out = dry_run
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-4000:]
    summary = (out / "summary.txt").read_text()
    assert summary == done.stdout
    for stage in ("decoder", "ops", "profile", "model", "plot"):
        assert re.search(rf"^{stage} +ok", summary, re.M), summary
    assert re.search("^sanitizer +not done: ", summary, re.M)


def test_dry_run_leaves_few_small_files(dry_run):
    _, out = dry_run
    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size < 16e6 for path in files)
    names = {path.name for path in files}
    assert {"summary.txt", "log.txt", "profile.txt", "times.png", "speedups.png", "roofline.png"} <= names


def test_dry_run_measures_and_gates(dry_run):
    """`--benchmark` is no abbreviation of pytest-benchmark's own options; what it adds is in the file."""
    _, out = dry_run
    (path,) = out.glob("*.csv")
    found = rows.read(path)
    assert {row["op"] for row in found} >= WORKLOADS.keys()
    assert {row["accurate"] for row in found if row["op"] in WORKLOADS} == {"True"}
    timed = [row for row in found if row["provider"] == "torch"]
    assert timed and all(float(row["p50_ms"]) > 0 and float(row["speedup"]) > 0 for row in timed)
    assert "rows added to" in (out / "log.txt").read_text()


@pytest.mark.sweep
def test_dry_run_with_the_oldest_triton(tmp_path):
    """Its interpreter takes a loop's bound with int(), which numpy 2.4 refuses for an array of one element."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*install, "triton==3.6.0", "numpy<2.4"], check=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "site")}
    script = ROOT / "benchmarks" / "on_gpu.sh"
    done = subprocess.run(["bash", script, tmp_path / "out", "--dry"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = (tmp_path / "out").glob("*.csv")
    assert {r["triton"] for r in rows.read(path)} == {"3.6.0"}


def limits(folder, *options):
    """{command: seconds} that on_gpu.sh gives its stages, none of which runs."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in (("timeout", 'echo "$@" >>"$LIMITS"'), ("python", "exit 0")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    env["LIMITS"] = str(folder / "limits")
    script = ROOT / "benchmarks" / "on_gpu.sh"
    subprocess.run(["bash", script, folder / "out", *options], env=env, capture_output=True, timeout=60)
    found = re.findall(r"^--kill-after=5 (\d+) (.*)", (folder / "limits").read_text(), re.M)
    return {command: int(seconds) for seconds, command in found}


def test_limits_of_the_stages(tmp_path):
    """A GPU is held for minutes; a dry run shows that every stage works, on a busy machine too."""
    (tmp_path / "dry").mkdir()
    on_a_gpu, dry = limits(tmp_path), limits(tmp_path / "dry", "--dry")
    assert len(on_a_gpu) >= 8 and max(on_a_gpu.values()) <= 150
    assert len(dry) >= 5 and min(dry.values()) >= 400


@pytest.mark.parametrize("arguments", [[], ["--only"], ["out", "--only", "everything"], ["a", "b"], ["out", "--fast"]])
def test_on_gpu_says_how_it_is_used(arguments, tmp_path):
    script = ROOT / "benchmarks" / "on_gpu.sh"
    done = subprocess.run(["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
    assert not list(tmp_path.iterdir())


def test_pictures(tmp_path):
    plot = pytest.importorskip("benchmarks.plot")
    gpu = {"op": "decoder", "mode": "inference", "queries": 300, "padded": False, "dtype": "bf16", "commit": "abc"}
    gpu |= {"device": "NVIDIA H100", "date": "2026-01-01", "torch": "2.11", "accurate": True, "speedup": 1.5}
    for tokens in (1050, 4200):
        for batch in (1, 8, 32):
            for provider in ("huggingface", "triton", "a new one"):
                sizes = {"batch": batch, "tokens": tokens, "provider": provider}
                rows.append(tmp_path / "a.csv", [row(**gpu, **sizes, p50_ms=1.0 + batch, floor_ms=0.1)])
    training = {"mode": "training", "batch": 2, "tokens": 1050, "saved_mb": 65.0}
    rows.append(tmp_path / "a.csv", [row(**(gpu | training))])
    pictures = {path.name for path in plot.draw(tmp_path, tmp_path / "out")}
    assert pictures == {"a-times.png", "a-speedups.png", "a-memory.png", "counts.png", "roofline.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures


def test_latency_counts_the_detections_that_differ():
    from benchmarks import latency

    found = latency.latencies(1, 0.0, torch.device("cpu"), tiny=True)
    assert found["differing"] == 0
    assert all(0 < t["p50"] <= t["p99"] for t in found["times"].values())
    assert "0 of the 100 best detections differ" in latency.table(found)
    theirs = {"scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4)}
    swapped = {name: x.flip(0) for name, x in theirs.items()}
    assert latency.differing(theirs, swapped) == 0
    for name, change in (("scores", 0.002), ("labels", 1), ("boxes", 0.06)):
        assert latency.differing(theirs, swapped | {name: swapped[name] + change}) == 2


def test_table_shows_the_newest_rows(tmp_path, capsys):
    from benchmarks import table

    old = {"op": "decoder", "mode": "inference", "batch": 1, "queries": 300, "tokens": 1050, "accurate": True}
    old |= {"dtype": "fp32", "padded": False, "device": "a CPU", "speedup": 1.5, "date": "2026-01-01"}
    rows.append(tmp_path / "a.csv", [row(**old), row(**(old | {"date": "2026-01-02", "p50_ms": 7.0}))])
    table.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "7" in shown and "1.50x" in shown and shown.count("torch ") == 2
    table.main([str(tmp_path), "--only", "model"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("queries, size, allowed", [(300, PAPER, 1.02e-2), (900, PAPER, 5.9e-3), (18, TINY, 8.3e-2)])
def test_the_gate_allows_for_one_unit_of_relu_among_so_many(queries, size, allowed):
    """Twice one term among width * queries / 2."""
    case = BenchmarkCase("decoder", "training", Shape(queries=queries), size=size)
    peer = {"error": 1e-6, "worst_error": 1e-6}
    assert cases_._accurate(case, peer | {"worst_error": 0.99 * allowed}, peer)
    assert not cases_._accurate(case, peer | {"worst_error": 1.01 * allowed}, peer)


def missed(found: list[rows.Row]) -> str:
    """Every error that the gate looks at, of the providers that miss it and of the baseline."""
    baseline = WORKLOADS[found[0]["op"]].baseline
    named = [r for r in found if not r["accurate"] or r["provider"] == baseline]
    said = (f"{r['provider']}: error {r['error']}, of the worst gradient {r.get('worst_error')}" for r in named)
    return ", ".join(said)


def test_what_misses_the_gate_is_named_with_both_errors():
    found = [
        {"op": "decoder", "provider": "huggingface", "accurate": True, "error": 1, "worst_error": 2},
        {"op": "decoder", "provider": "torch", "accurate": True, "error": 3, "worst_error": 4},
        {"op": "decoder", "provider": "triton", "accurate": False, "error": 5, "worst_error": 6},
    ]
    assert missed(found) == "huggingface: error 1, of the worst gradient 2, triton: error 5, of the worst gradient 6"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", cases(CPU, "tiny"), ids=str)
def test_on_a_gpu_every_backend_is_accurate(case, dtype):
    result = measure_case(dataclasses.replace(case, dtype=dtype), torch.device("cuda"), rounds=1)
    ours = {r["provider"]: r for r in result.rows if PROVIDERS[r["provider"]].ours}
    assert "triton" in ours, (result.skipped, result.failed)
    assert all(r["accurate"] for r in ours.values()), missed(result.rows)
    assert not result.failed.keys() & {name for name, p in PROVIDERS.items() if p.ours}
