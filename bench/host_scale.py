"""Does the host's time a step stay what it is when the pool, the queue of waiting requests and the crowd grow?

Bound by one core's plain Python. The real `core/` and the input batch, without a device, one step ahead as in the
engine: every sequence decodes a token a step, one request in a hundred ends, one that waited begins in its place, and
a new one queues up. Every pool was used once before, so that its free blocks are all in the prefix cache. The bars:
linear in the sequences that run, no growth with the pool, none with those who wait. The sizes of a series are worker
processes that step in turn; growth is the exponent that fits their points best (0: flat, 1: linear). Memory is what
Python allocates, in processes of its own.

    python -m bench.host_scale --output bench/results/host-scale.json
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.host_loop import StepTimes
from bench.host_scale_worker import Crowd
from bench.record import describe_run, note, save_result, write_result
from bench.worker import Worker

WORKER = "bench.host_scale_worker"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One size that grows while the others stay."""

    name: str
    varied: str
    """Field of a crowd."""
    crowds: tuple[Crowd, ...]
    most_growth: float
    """The bar: the exponent must not be above it."""


def make_series(num_running: int, num_blocks: int, num_waiting: int) -> list[Series]:
    """Each of the three sizes from a small part of it upwards; only the first series has all three at their largest."""
    small = Crowd(num_running=max(1, num_running // 10), num_blocks=num_blocks // 30, num_waiting=100)
    large = replace(small, num_blocks=num_blocks, num_waiting=num_waiting)

    def grown(crowd: Crowd, varied: str, largest: int, parts: Sequence[int]) -> tuple[Crowd, ...]:
        return tuple(replace(crowd, **{varied: largest // part}) for part in parts)

    by_priority = replace(small, has_priorities=True)
    return [
        # above 1 by what a crowd outgrows of the processor's caches
        Series(name="running", varied="num_running", most_growth=1.25,
               crowds=grown(large, "num_running", num_running, (10, 4, 2, 1))),
        Series(name="pool", varied="num_blocks", most_growth=0.05,
               crowds=grown(small, "num_blocks", num_blocks, (30, 10, 3, 1))),
        Series(name="waiting", varied="num_waiting", most_growth=0.05,
               crowds=grown(small, "num_waiting", num_waiting, (1000, 100, 10, 1))),
        Series(name="waiting by priority", varied="num_waiting", most_growth=0.05,
               crowds=grown(by_priority, "num_waiting", num_waiting, (1000, 100, 10, 1))),
    ]  # fmt: skip


def summary(crowd: Crowd, steps: Sequence[dict[str, float]], peak_memory_bytes: int) -> dict[str, Any]:
    """Medians of the parts; the mean and the longest step tell what the garbage collector adds."""
    host = [step["host"] for step in steps]
    return {
        **asdict(crowd),
        **{f"{name}_ms": statistics.median(step[name] for step in steps) for name in (*StepTimes._fields, "host")},
        "host_ms_mean": statistics.mean(host), "host_ms_max": max(host),
        "collector_ms_mean": statistics.mean(step["collector"] for step in steps),
        "host_us_per_seq": 1e3 * statistics.median(host) / crowd.num_running, "num_steps": len(steps),
        "peak_memory_bytes": peak_memory_bytes,
    }  # fmt: skip


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power law through the points: the slope of a least-squares line through their logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def measure_series(series: Series, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All crowds of a series, stepped in turn, so that a slow moment of the machine meets them all."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(sys.executable, WORKER, folder / f"{series.name}-{index}.log"))
            for index in range(len(series.crowds))
        ]
        for worker, crowd in zip(workers, series.crowds, strict=True):
            worker.call("prepare", **asdict(crowd))
        steps: list[list[dict[str, float]]] = [[] for _ in workers]
        for _ in range(args.rounds):
            for worker, taken in zip(workers, steps, strict=True):
                taken += worker.call("run", num_steps=args.steps)
        peaks = [worker.call("finish")["peak_memory_bytes"] for worker in workers]
    rows = [summary(*each) for each in zip(series.crowds, steps, peaks, strict=True)]
    sizes = [getattr(crowd, series.varied) for crowd in series.crowds]
    exponents = {
        name: growth(sizes, [row[name] for row in rows]) for name in ("host_ms", "host_ms_mean")
    }
    note(f"{series.name}: the median step grows with exponent {exponents['host_ms']:.3f}")
    return {
        "name": series.name, "varied": series.varied, "rows": rows, "growth": exponents["host_ms"],
        "growth_of_mean": exponents["host_ms_mean"], "most_growth": series.most_growth,
        "is_within_bar": exponents["host_ms"] <= series.most_growth,
    }  # fmt: skip


def measure_memory(largest: Crowd, folder: Path) -> list[dict[str, Any]]:
    """A tenth of the largest crowd, and all of it."""
    rows = []
    for part in (10, 1):
        crowd = Crowd(**{
            name: max(1, getattr(largest, name) // part) for name in ("num_running", "num_blocks", "num_waiting")
        })  # fmt: skip
        with Worker(sys.executable, WORKER, folder / f"memory-{part}.log") as worker:
            rows.append({**asdict(crowd), **worker.call("memory", **asdict(crowd))})
    return rows


def print_report(result: dict[str, Any]) -> None:
    """The tables for people."""
    for series in result["series"]:
        verdict = "within" if series["is_within_bar"] else "ABOVE"
        print(f"\n{series['name']}: exponent {series['growth']:.3f} of the median, {series['growth_of_mean']:.3f} of "
              f"the mean; the median is {verdict} its bar of {series['most_growth']}")
        print(f"{'running':>8}{'blocks':>10}{'waiting':>9}{'turnover':>10}{'schedule':>10}{'build':>9}{'update':>9}"
              f"{'median ms':>11}{'mean ms':>9}{'max ms':>9}{'collector':>11}{'us a seq':>10}{'peak MiB':>10}")
        for row in series["rows"]:
            print(f"{row['num_running']:8d}{row['num_blocks']:10d}{row['num_waiting']:9d}{row['turnover_ms']:10.3f}"
                  f"{row['schedule_ms']:10.3f}{row['build_ms']:9.3f}{row['update_ms']:9.3f}{row['host_ms']:11.3f}"
                  f"{row['host_ms_mean']:9.3f}{row['host_ms_max']:9.2f}{row['collector_ms_mean']:11.3f}"
                  f"{row['host_us_per_seq']:10.2f}{row['peak_memory_bytes'] / 2**20:10.0f}")
    columns = {
        "bytes_per_block": "block", "bytes_per_cached_block": "cached block",
        "bytes_per_waiting_request": "waiting request", "bytes_per_request_object": "(its Request)",
        "bytes_per_running_sequence": "running sequence",
    }  # fmt: skip
    print(f"\nbytes of a{'':<21}" + "".join(f"{name:>18}" for name in columns.values()))
    for row in result["memory"]:
        crowd = f"{row['num_running']} / {row['num_blocks']} / {row['num_waiting']}"
        print(f"{crowd:<32}" + "".join(f"{row[name]:18.0f}" for name in columns))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.host_scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-running", type=int, default=10_000)
    parser.add_argument("--num-blocks", type=int, default=1_000_000)
    parser.add_argument("--num-waiting", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each size")
    parser.add_argument("--series", nargs="+", metavar="NAME", help="only these, e.g. pool")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if min(args.steps, args.rounds, args.num_running) < 1 or args.num_waiting < 1000:
        parser.error("--steps, --rounds and --num-running must be 1 or more, --num-waiting 1,000 or more")
    # the smallest pool of a series is a thirtieth, and holds what runs and the prompts that use every block once
    num_needed = max(100 * args.num_running, 30 * 400)
    if args.num_blocks < num_needed:
        parser.error(f"--num-blocks={args.num_blocks} is too small for this crowd: give {num_needed} or more")
    known = [series.name for series in make_series(args.num_running, args.num_blocks, args.num_waiting)]
    for name in args.series or ():
        if name not in known:
            parser.error(f"--series {name} is not known: choose among {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    sizes = (args.num_running, args.num_blocks, args.num_waiting)
    result: dict[str, Any] = {**describe_run("bench.host_scale", arguments), "series": [], "memory": []}
    with tempfile.TemporaryDirectory(prefix="bench-host-scale-") as scratch:
        for series in make_series(*sizes):
            if not args.series or series.name in args.series:
                result["series"].append(measure_series(series, args, Path(scratch)))
                save_result(result, args.output)
        largest = Crowd(num_running=sizes[0], num_blocks=sizes[1], num_waiting=sizes[2])
        result["memory"] = measure_memory(largest, Path(scratch))
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
