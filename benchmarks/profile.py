"""Where the time goes: python -m benchmarks.profile [--device cuda] [--tiny] [--model] [--rows 15]

The kernels (on a CPU: the operators) of one forward, per provider, with their number and time, from PyTorch's
profiler. On a GPU this is the true number of launches, and how long the GPU was busy.
"""

from __future__ import annotations

import argparse
import collections

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from dab_fast.bench import rows
from dab_fast.bench.cases import BenchmarkCase
from dab_fast.bench.providers import Provider
from dab_fast.bench.workloads import ONE_IMAGE, PAPER, TINY, Shape

NAME_WIDTH = 90


def kernels(case: BenchmarkCase, device: torch.device, provider: Provider) -> dict[str, tuple[int, float]]:
    """{kernel: (times, microseconds)} of one warm forward; on a CPU of operators."""
    prepared = provider.build(case.workload(device))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.no_grad():
        for _ in range(3):
            prepared.forward()
        with profile(activities=activities) as profiler:
            prepared.forward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for event in profiler.events():
        if device.type == "cuda":
            if event.device_type != DeviceType.CUDA or event.name.startswith(("Memset", "Memcpy")):
                continue
            microseconds = event.time_range.elapsed_us()
        else:
            microseconds = event.self_cpu_time_total
        times, total = found[event.name]
        found[event.name] = times + 1, total + microseconds
    return found


def report(case: BenchmarkCase, device: torch.device, limit: int) -> str:
    lines = [f"{case} on {rows.device_name(device)}"]
    work = case.workload(device)
    for provider in case.providers():
        if provider.compiled:
            continue
        if (reason := provider.why_not(work)) is not None:
            lines.append(f"{provider.name}: {reason}")
            continue
        try:
            found = kernels(case, device, provider)
        except Exception as error:  # one provider's failure leaves the others' tables
            lines.append(f"{provider.name} failed: {type(error).__name__}: {error}")
            continue
        what = "kernels" if device.type == "cuda" else "operators"
        total = sum(us for _, us in found.values())
        lines.append(f"{provider.name}: {sum(n for n, _ in found.values())} {what}, {total:.0f} us")
        for name, (n, us) in sorted(found.items(), key=lambda item: -item[1][1])[:limit]:
            lines.append(f"  {n:5} x  {us:9.1f} us  {name[:NAME_WIDTH]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shows that it runs")
    parser.add_argument("--model", action="store_true", help="the whole model too")
    parser.add_argument("--rows", type=int, default=15)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shape, size = (Shape(1, 9, 5, 7), TINY) if args.tiny else (ONE_IMAGE, PAPER)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    for kind in ("decoder", "model") if args.model else ("decoder",):
        print(report(BenchmarkCase(kind, "inference", shape, dtype, size), device, args.rows), flush=True)


if __name__ == "__main__":
    main()
