"""How large should a block be? Tokens a second, end to end, in equal memory. (Kwon et al. 2023, figure 18b)

Live: the same requests, all at time 0, in memory that holds about `--at-once` of the mean length, so that what blocks
waste at the ends of sequences decides how many run. Lengths are log-normal with ShareGPT's and Alpaca's means and end
by length; weights are random. Bound by arithmetic on a CPU. Block sizes take turns; the first round, which compiles, is
not counted. Requests at once and the share of memory that holds tokens are counts and do not depend on the machine.

    python -m bench.paper.block_size --output bench/results/block_size.json
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.batching import Watch
from bench.paper.command import describe, make_parser, parse_sized
from bench.paper.live import serve
from bench.paper.virtual_clock import Arrival
from bench.record import note, write_result
from bench.report import spread
from bench.shapes import SHAPES, write_model
from bench.workloads import PAPER_MEANS, paper_lens
from jaxpaged import LLM

MAX_MODEL_LEN = 2048
STEP_TOKENS = 512
LONGEST = {"ShareGPT-like": MAX_MODEL_LEN // 2, "Alpaca-like": 256}
"""Clip of prompts and of outputs: memory must hold both."""
PAPER_GOOD = {"ShareGPT-like": (16, 128), "Alpaca-like": (16, 32)}
"""Block sizes, from and to, that the paper found to perform best."""
SMALL = {"shape": "tiny", "block_sizes": [8, 64], "num_requests": [8, 24], "repeats": 1, "at_once": 4}


def num_slots(lengths: str, at_once: int, largest_block: int) -> int:
    """Tokens that fit in memory: so many requests of the mean length, the longest one at least, in whole blocks."""
    least = 2 * LONGEST[lengths] + largest_block
    return -(-max(at_once * sum(PAPER_MEANS[lengths]), least) // largest_block) * largest_block


def write_long_model(shape: str, folder: Path, seed: int) -> Path:
    """A model folder for MAX_MODEL_LEN positions."""
    return write_model(replace(SHAPES[shape], max_position_embeddings=MAX_MODEL_LEN), folder, seed=seed)


def load(folder: Path, block_size: int, slots: int, **options: Any) -> LLM:
    """The engine with blocks for `slots` tokens."""
    return LLM(
        str(folder), max_num_seqs=64, max_num_batched_tokens=STEP_TOKENS, max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        num_device_blocks=1 + slots // block_size, enable_prefix_caching=False, show_progress=False, **options,
    )  # fmt: skip


def measure_lengths(folder: Path, lengths: str, num_requests: int, args: Any) -> list[dict[str, Any]]:
    """A row for each block size."""
    slots = num_slots(lengths, args.at_once, max(args.block_sizes))
    lens = paper_lens(np.random.default_rng(args.seed), num_requests, lengths, longest=LONGEST[lengths])
    arrivals = [Arrival(0.0, *pair) for pair in lens]
    engines = {size: load(folder, size, slots, preemption="recompute") for size in args.block_sizes}
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in args.block_sizes}
    watches = {size: Watch() for size in args.block_sizes}
    for round_number in range(args.repeats + 1):
        for size, llm in engines.items():
            watch = watches[size] = Watch()
            run = serve(llm, arrivals, look=watch.look, seed=args.seed)
            if round_number:
                runs[size].append(run)
        note(f"{lengths}: round {round_number} of {args.repeats} done")
    return [
        {
            "lengths": lengths, "block_size": size, "num_slots": slots, "num_requests": num_requests,
            "tokens_per_s": spread([run["tokens_per_s"] for run in runs[size]]),
            "normalized_latency_s": spread([run["normalized_latency_s"] for run in runs[size]]),
            **watches[size].means(slots),
            "num_steps": runs[size][-1]["num_steps"], "num_preemptions": runs[size][-1]["num_preemptions"],
            "num_compiles": sum(run["num_compiles"] for run in runs[size]),
        }
        for size in args.block_sizes
    ]  # fmt: skip


def print_report(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    print(f"{'lengths':<15}{'block':>6}{'tokens/s':>10}{'min':>9}{'max':>9}{'of best':>9}{'at once':>9}"
          f"{'tokens, %':>11}{'steps':>7}{'paper':>14}")
    for row in rows:
        rate = row["tokens_per_s"]
        best = max(other["tokens_per_s"]["median"] for other in rows if other["lengths"] == row["lengths"])
        low, high = PAPER_GOOD[row["lengths"]]
        paper = "good" if low <= row["block_size"] <= high else "worse"
        print(f"{row['lengths']:<15}{row['block_size']:6d}{rate['median']:10.0f}{rate['min']:9.0f}{rate['max']:9.0f}"
              f"{rate['median'] / best:9.0%}{row['mean_running']:9.1f}{row['percent_of_memory_with_tokens']:11.1f}"
              f"{row['num_steps']:7d}{paper:>14}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("bench.paper.block_size", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="15M")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--num-requests", type=int, nargs=2, default=[48, 192], metavar=("SHAREGPT", "ALPACA"))
    parser.add_argument("--at-once", type=int, default=16, help="requests of the mean length that fit in memory")
    parser.add_argument("--repeats", type=int, default=3)
    args = parse_sized(parser, arguments, SMALL)
    if min(args.repeats, args.at_once, *args.block_sizes, *args.num_requests) < 1:
        parser.error("numbers must be 1 or more")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-block-size-") as scratch:
        folder = write_long_model(args.shape, Path(scratch) / "model", args.seed)
        for lengths, num_requests in zip(PAPER_MEANS, args.num_requests, strict=True):
            rows += measure_lengths(folder, lengths, num_requests, args)
    print_report(rows)
    result = describe("bench.paper.block_size", arguments, args)
    result |= {"shape": args.shape, "rows": rows, "paper_good": {name: list(pair) for name, pair in PAPER_GOOD.items()}}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
