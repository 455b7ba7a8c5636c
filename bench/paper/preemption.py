"""Swap or recompute? What each costs by block size, alone and end to end. (Kwon et al. 2023, figure 19)

Alone: the blocks of `--num-tokens` tokens are copied to the host and back (bound by the link of device and host; on a
CPU, copies within its memory), or as many tokens go through the model again in one step (bound by the matmul rate).
End to end: requests of ShareGPT's lengths, all at time 0, in memory for a few of them, so that many are preempted; both
ways take turns, with the same requests in the same order. The first round, which compiles, is not counted.

    python -m bench.paper.preemption --output bench/results/preemption.json
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.paper.block_size import LONGEST, STEP_TOKENS, load, num_slots, write_long_model
from bench.paper.command import describe, make_parser, parse_sized
from bench.paper.live import serve
from bench.paper.virtual_clock import Arrival
from bench.record import note, write_result
from bench.report import spread
from bench.shapes import SHAPES, LlamaShape
from bench.steps import run_s
from bench.swap import make_cache, time_swaps
from bench.workloads import paper_lens
from jaxpaged.runner.swap import STAGING_SIZES, BlockMover
from pallas_kernels import KVLayout

WAYS = ("swap", "recompute")
LENGTHS = "ShareGPT-like"
PAPER_SAYS = "recompute costs the same at any block size and at most 20 % more than swap; small blocks make swap slow"
SMALL = {
    "shape": "tiny", "block_sizes": [16], "num_requests": 8, "at_once": 2, "num_tokens": 64, "repeats": 1,
    "micro_repeats": 2,
}  # fmt: skip


def swap_s(shape: LlamaShape, block_size: int, num_tokens: int, repeats: int) -> list[float]:
    """Seconds to copy the blocks of so many tokens out and in again, as the engine does."""
    layout = KVLayout(
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, block_size=block_size, dtype="float32"
    )
    num_blocks = -(-num_tokens // block_size)
    kv = make_cache(layout, num_layers=shape.num_layers, num_blocks=2 * num_blocks + 1)
    mover = BlockMover(kv, num_blocks + 1, staging_sizes=STAGING_SIZES)
    kv = jax.block_until_ready(mover.warm_up(kv))
    _, times = time_swaps(mover, kv, num_blocks, repeats)
    return [out + back for out, back in zip(times["out"], times["in"], strict=True)]


def measure_alone(folder: Path, args: Any) -> list[dict[str, Any]]:
    """Milliseconds of both ways for each block size."""
    rows = []
    shape = SHAPES[args.shape]
    rng = np.random.default_rng(args.seed)
    for block_size in args.block_sizes:
        llm = load(folder, block_size, num_slots(LENGTHS, 1, block_size))
        times = []
        for _ in range(args.micro_repeats + 1):
            fresh = rng.integers(3, shape.vocab_size, args.num_tokens).tolist()
            times.append(run_s(llm, [fresh], 1))
        copies = swap_s(shape, block_size, args.num_tokens, args.micro_repeats)
        ways = {"swap": copies, "recompute": times[1:]}
        rows.append({
            "block_size": block_size, "num_tokens": args.num_tokens,
            **{f"{way}_ms": spread([1e3 * each for each in ways[way]]) for way in WAYS},
        })  # fmt: skip
        note(f"blocks of {block_size}: swap {1e3 * statistics.median(copies):.2f} ms")
    return rows


def measure_end_to_end(folder: Path, args: Any) -> list[dict[str, Any]]:
    """A row for each block size and way, in turn."""
    slots = num_slots(LENGTHS, args.at_once, max(args.block_sizes))
    lens = paper_lens(np.random.default_rng(args.seed), args.num_requests, LENGTHS, longest=LONGEST[LENGTHS])
    arrivals = [Arrival(0.0, *pair) for pair in lens]
    rows = []
    for block_size in args.block_sizes:
        engines = {way: load(folder, block_size, slots, preemption=way) for way in WAYS}
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for round_number in range(args.repeats + 1):
            for way, llm in engines.items():
                run = serve(llm, arrivals, seed=args.seed)
                if not run["num_preemptions"]:
                    raise ValueError("nothing was preempted: lower --at-once, or give more requests")
                if round_number:
                    runs[way].append(run)
        for way in WAYS:
            last = runs[way][-1]
            rows.append({
                "block_size": block_size, "way": way, "num_slots": slots,
                "tokens_per_s": spread([run["tokens_per_s"] for run in runs[way]]),
                "normalized_latency_s": spread([run["normalized_latency_s"] for run in runs[way]]),
                **{name: last[name] for name in ("num_steps", "num_preemptions", "num_swapped_out_blocks")},
                "num_compiles": sum(run["num_compiles"] for run in runs[way]),
            })  # fmt: skip
        note(f"blocks of {block_size}, end to end: done")
    return rows


def print_report(alone: Sequence[dict[str, Any]], end_to_end: Sequence[dict[str, Any]]) -> None:
    """The tables for people."""
    print(f"{alone[0]['num_tokens']} tokens alone, ms (paper: {PAPER_SAYS})")
    print(f"{'block':>6}{'swap':>10}{'min':>9}{'recompute':>11}{'min':>9}{'recompute/swap':>16}")
    for row in alone:
        swap, again = row["swap_ms"], row["recompute_ms"]
        print(f"{row['block_size']:6d}{swap['median']:10.2f}{swap['min']:9.2f}{again['median']:11.2f}{again['min']:9.2f}"
              f"{again['median'] / swap['median']:15.1f}x")
    print(f"\n{'block':>6}  {'end to end':<11}{'tokens/s':>10}{'min':>9}{'max':>9}{'preempted':>11}{'blocks out':>12}")
    for row in end_to_end:
        rate = row["tokens_per_s"]
        print(f"{row['block_size']:6d}  {row['way']:<11}{rate['median']:10.0f}{rate['min']:9.0f}{rate['max']:9.0f}"
              f"{row['num_preemptions']:11d}{row['num_swapped_out_blocks']:12d}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("bench.paper.preemption", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="15M")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--num-tokens", type=int, default=256, help="swapped or computed again, alone")
    parser.add_argument("--micro-repeats", type=int, default=11)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=6, help="requests of the mean length that fit in memory")
    parser.add_argument("--repeats", type=int, default=3)
    args = parse_sized(parser, arguments, SMALL)
    numbers = (args.num_tokens, args.micro_repeats, args.num_requests, args.at_once, args.repeats, *args.block_sizes)
    if min(numbers) < 1 or args.num_tokens > STEP_TOKENS:
        parser.error(f"numbers must be 1 or more, and --num-tokens at most {STEP_TOKENS}, which go in one step")
    with tempfile.TemporaryDirectory(prefix="bench-preemption-") as scratch:
        folder = write_long_model(args.shape, Path(scratch) / "model", args.seed)
        alone = measure_alone(folder, args)
        end_to_end = measure_end_to_end(folder, args)
    print_report(alone, end_to_end)
    result = describe("bench.paper.preemption", arguments, args)
    result |= {"shape": args.shape, "alone": alone, "end_to_end": end_to_end, "paper_says": PAPER_SAYS}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
