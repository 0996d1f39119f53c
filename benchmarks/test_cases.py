"""Every case, provider by provider. All providers of a case are timed in turn, in one run, by the first of its tests;
each test then shows pytest-benchmark what was recorded for its provider."""

from __future__ import annotations

import pytest

from dab_fast.bench.providers import PROVIDERS


class Recorded:
    """A clock that moves by the recorded times, so that pytest-benchmark's statistics are of those."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Recorded()


@pytest.mark.benchmark(timer=CLOCK)
def test_case(case, provider, state, progress, request):
    result = state.result(case, progress)
    row = next((row for row in result.rows if row["provider"] == provider), None)
    if row is not None and provider in result.times:
        recorded = iter(result.times[provider].best)

        def replay() -> None:
            CLOCK.now += next(recorded)

        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = str(case)
        benchmark.extra_info.update({key: row.get(key) for key in ("error", "peer_error", "accurate", "speedup")})
        benchmark.pedantic(replay, rounds=row["rounds"])
    if provider in result.skipped:
        pytest.skip(result.skipped[provider])
    if provider in result.failed:
        if PROVIDERS[provider].ours:
            raise result.failed[provider]
        pytest.skip(f"it failed: {result.failed[provider]}")
    assert row is not None
    if PROVIDERS[provider].ours:
        assert row["accurate"], f"error {row['error']} against float64, the baseline's {row['peer_error']}"
