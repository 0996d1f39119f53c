"""`pytest benchmarks/ --benchmark` times every case; without the flag each runs once, tiny, as a smoke test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from dab_fast.bench import rows
from dab_fast.bench.cases import cases, measure_case

RESULTS = Path(__file__).with_name("results")


def pytest_addoption(parser):
    group = parser.getgroup("dab_fast")
    group.addoption("--benchmark", action="store_true", help="time the cases and add rows to the results")
    group.addoption("--tiny", action="store_true", help="the smoke test's sizes, timed: shows that everything runs")
    group.addoption("--full", action="store_true", help="every shape and dtype, not the five-minute set")
    group.addoption("--device", default=None, help="cpu or cuda; default: a GPU where there is one")
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the CSV files (%(default)s)")
    group.addoption("--replace", action="store_true", help="replace rows of the same commit and day")
    group.addoption("--seconds", type=float, default=3.0, help="of timed rounds per case (%(default)s)")
    group.addoption("--rounds", type=int, default=0, help="at most this many; default: 30 on a CPU, 200 on a GPU")


def pytest_configure(config):
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
    config.stash[STATE] = _State(config)


class _State:
    """The cases measured so far; each is measured once, when the first of its providers' tests asks."""

    def __init__(self, config):
        self.timed = config.getoption("--benchmark")
        self.device = torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        tiny = not self.timed or config.getoption("--tiny")
        self.level = "tiny" if tiny else "full" if config.getoption("--full") else "default"
        self.cases = cases(self.device, self.level)
        self.file = rows.results_file(config.getoption("--results"), self.device)
        self.replace = config.getoption("--replace")
        self.seconds = config.getoption("--seconds") if self.timed else 0.0
        self.rounds = (config.getoption("--rounds") or (200 if self.device.type == "cuda" else 30)) if self.timed else 1
        self.results, self.measured = {}, 0
        self.chosen = {}  # {case: its providers that were selected}
        self.rows, self.refused, self.skipped = [], [], {}

    def result(self, case, progress):
        if case not in self.results:
            self.measured += 1
            progress(f"[{self.measured}/{len(self.chosen)}] {case}")
            found = self.results[case] = measure_case(
                case,
                self.device,
                rounds=self.rounds,
                seconds=self.seconds,
                rest=0.002 * (self.device.type == "cuda"),
                only=self.chosen[case],
            )
            self.skipped |= found.skipped
            self.rows += found.rows
            if self.timed:
                self.refused += rows.append(self.file, found.rows, replace=self.replace)
        return self.results[case]


STATE = pytest.StashKey[_State]()


@pytest.fixture
def state(request):
    return request.config.stash[STATE]


@pytest.fixture
def progress(request):
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    timed = request.config.getoption("--benchmark")
    return reporter.write_line if reporter is not None and timed else lambda line: None


def pytest_generate_tests(metafunc):
    if {"case", "provider"} <= set(metafunc.fixturenames):
        pairs = [(case, p.name) for case in metafunc.config.stash[STATE].cases for p in case.providers()]
        metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case}-{provider}" for case, provider in pairs])


def pytest_collection_finish(session):
    state = session.config.stash[STATE]
    for item in session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if {"case", "provider"} <= params.keys():
            state.chosen.setdefault(params["case"], []).append(params["provider"])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    state = config.stash[STATE]
    if not state.timed:
        return
    terminalreporter.section(f"dab_fast on {rows.device_name(state.device)}")
    terminalreporter.write_line(rows.table(state.rows))
    for name, reason in state.skipped.items():
        terminalreporter.write_line(f"{name} did not take part: {reason}")
    terminalreporter.write_line(f"{len(state.rows) - len(state.refused)} rows added to {state.file}")
    if state.refused:
        terminalreporter.write_line(
            f"{len(state.refused)} rows of this commit and day were there already and stay (--replace replaces them)"
        )
