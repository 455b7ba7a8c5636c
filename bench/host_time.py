"""How long does the host think before each step, and how does that grow with the sequences that run?

Bound by one core's plain Python and numpy; the bar is 1 ms a step at 64 running sequences, and linear growth. The real
scheduler, block manager and input batch run one step ahead, as in the engine, around a runner that has no device: every
sequence decodes one token a step, greedily. Scheduling, building and updating are timed apart; no prefill is timed.

    python -m bench.host_time --num-seqs 64 256 1024 --output bench/results/host_time.json
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.host_loop import BLOCK_SIZE, HostLoop
from bench.record import describe_run, note, write_result

MAX_MODEL_LEN = 2048
PARTS = ("schedule", "build", "update")


def measure(num_seqs: int, *, context_len: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds of each part of a step with `num_seqs` decoding at `context_len` and beyond; medians over steps."""
    # ample: nobody is preempted, the scheduler's reserve of free blocks keeps nobody waiting, and one could end alone
    num_blocks = MAX_MODEL_LEN // BLOCK_SIZE + 2 * num_seqs * -(-(context_len + num_steps + 64) // BLOCK_SIZE) + 1
    loop = HostLoop(max_num_seqs=num_seqs, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN)
    for _ in range(num_seqs):
        loop.scheduler.add(loop.make_request(context_len))
    times: list[tuple[float, ...]] = []
    while len(times) < num_steps:
        was_full = loop.is_full
        step = loop.step()
        if was_full and loop.is_full:
            times.append((step.schedule, step.build, step.update))
    totals = [1e3 * sum(step) for step in times]
    columns = zip(*times, strict=True)
    parts = {f"{name}_ms": 1e3 * statistics.median(column) for name, column in zip(PARTS, columns, strict=True)}
    return {
        "num_seqs": num_seqs,
        **parts,
        "host_ms": statistics.median(totals),
        "host_ms_min": min(totals),
        "host_ms_p95": sorted(totals)[int(0.95 * (len(totals) - 1))],
        "host_us_per_seq": 1e3 * statistics.median(totals) / num_seqs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-seqs", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--context-len", type=int, default=250)
    parser.add_argument("--num-steps", type=int, default=100, help="steps measured, every sequence decoding")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(arguments)
    if min(args.num_seqs) < 1 or args.num_steps < 1 or not 1 <= args.context_len <= MAX_MODEL_LEN - args.num_steps - 64:
        parser.error(f"counts must be 1 or more, and context and steps fit in {MAX_MODEL_LEN} tokens")
    rows = []
    for num_seqs in args.num_seqs:
        rows.append(measure(num_seqs, context_len=args.context_len, num_steps=args.num_steps))
        note(f"{num_seqs} sequences: {rows[-1]['host_ms']:.3f} ms a step")
    result = {**describe_run("bench.host_time", arguments), "context_len": args.context_len}
    result |= {"num_steps": args.num_steps, "rows": rows}
    print(f"{'sequences':>9}{'schedule':>10}{'build':>9}{'update':>9}"
          f"{'total ms':>10}{'min ms':>9}{'p95 ms':>9}{'us a seq':>10}")
    for row in rows:
        print(f"{row['num_seqs']:9d}{row['schedule_ms']:10.3f}{row['build_ms']:9.3f}{row['update_ms']:9.3f}"
              f"{row['host_ms']:10.3f}{row['host_ms_min']:9.3f}{row['host_ms_p95']:9.3f}{row['host_us_per_seq']:10.2f}")
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
