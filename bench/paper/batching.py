"""How many requests run at once in equal KV memory, and how much of it holds tokens? (Kwon et al. 2023, figures 2, 13)

Paging against contiguous reservations (`reservation.py`), live: the same engine, kernels, requests and order, and each
policy's own limit to what may run. Means over the steps in which requests still wait, so that memory is what bounds
them. 15,700 slots for tokens and 2,048 positions are what the paper's 13B model had on its GPU; lengths are log-normal
with ShareGPT's means (161 and 338 tokens) and end by length; weights are random. Counts, not times: they do not depend
on the machine.

    python -m bench.paper.batching --output bench/results/batching.json
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.command import describe, make_parser, parse_sized
from bench.paper.live import serve
from bench.paper.reservation import POLICIES, Policy, ReservationGate
from bench.paper.virtual_clock import Arrival
from bench.record import note, write_result
from bench.shapes import SHAPES, write_model
from bench.workloads import lognormal_lens
from jaxpaged import LLM
from jaxpaged.engine.engine import Engine

MAX_MODEL_LEN = 2048
LONGEST = MAX_MODEL_LEN // 2
BLOCK_SIZE = 16
PAPER_REQUESTS = {"max": 7.0, "pow2": 9.8, "oracle": 13.6, "paging": 30.4}
"""Requests in a batch, OPT-13B on ShareGPT, figure 13."""
PAPER_TOKENS = {"max": 20.4, "pow2": 26.8, "oracle": 38.2, "paging": 96.3}
"""Percent of KV memory that holds tokens, figure 2."""

SMALL = {"num_requests": 60, "num_slots": 4096, "prompt_mean": 40, "output_mean": 30}


@dataclass
class Watch:
    """What is true after each step while requests wait."""

    num_running: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in memory."""

    def look(self, engine: Engine) -> None:
        counts = engine.scheduler.counts()
        if counts.waiting:
            self.num_running.append(counts.running)
            self.num_tokens.append(
                sum(sequence.num_computed_tokens for group in engine.scheduler.groups for sequence in group.unfinished)
            )

    def means(self, num_slots: int) -> dict[str, float]:
        """Over the steps in which requests waited; ValueError where there was none."""
        if not self.num_running:
            raise ValueError("no request had to wait: give more requests, or fewer slots")
        return {
            "mean_running": statistics.mean(self.num_running),
            "percent_of_memory_with_tokens": 100 * statistics.mean(self.num_tokens) / num_slots,
        }


def make_lens(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Prompt and output lengths."""
    rng = np.random.default_rng(args.seed)
    prompt_lens = lognormal_lens(rng, args.num_requests, args.prompt_mean, longest=LONGEST)
    output_lens = lognormal_lens(rng, args.num_requests, args.output_mean, longest=LONGEST)
    return list(zip(prompt_lens, output_lens, strict=True))


def serve_all(
    folder: Path, lens: Sequence[tuple[int, int]], policy: Policy | None, args: argparse.Namespace,
    *, has_buddies: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """All requests at time 0 under a policy (None: paging)."""
    llm = LLM(
        str(folder), max_num_seqs=args.max_num_seqs, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE,
        num_device_blocks=1 + args.num_slots // BLOCK_SIZE, enable_prefix_caching=False, preemption="recompute",
        show_progress=False,
    )  # fmt: skip
    gate = None
    if policy is not None:
        gate = ReservationGate(
            policy, num_slots=args.num_slots, max_model_len=MAX_MODEL_LEN, has_buddies=has_buddies
        )
    watch = Watch()
    told = serve(llm, [Arrival(0.0, *pair) for pair in lens], gate=gate, look=watch.look, seed=args.seed)
    return {
        "policy": policy or "paging",
        "has_buddies": has_buddies if policy else None,
        **watch.means(args.num_slots),
        "num_steps": told["num_steps"],
        "num_preemptions": told["num_preemptions"],
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each policy with and without buddies, and for paging."""
    shape = replace(SHAPES["tiny"], max_position_embeddings=MAX_MODEL_LEN)
    lens = make_lens(args)
    with tempfile.TemporaryDirectory(prefix="bench-batching-") as scratch:
        folder = write_model(shape, Path(scratch) / "model", seed=args.seed)
        rows = []
        for policy, has_buddies in [*((p, b) for b in (True, False) for p in POLICIES), (None, True)]:
            rows.append(serve_all(folder, lens, policy, args, has_buddies=has_buddies))
            note(f"{rows[-1]['policy']}: {rows[-1]['mean_running']:.1f} requests in {rows[-1]['num_steps']} steps")
    return rows


def print_report(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    paging = rows[-1]["mean_running"]
    print(f"{'memory policy':<30}{'requests':>9}{'paging is':>11}{'paper':>8}{'tokens, %':>11}{'paper':>8}{'steps':>8}")
    for row in rows:
        policy = row["policy"]
        name = policy if policy == "paging" else f"{policy}, {'buddies' if row['has_buddies'] else 'ideally packed'}"
        has_paper = row["has_buddies"] is not False
        ratio = PAPER_REQUESTS["paging"] / PAPER_REQUESTS[policy]
        print(
            f"{name:<30}{row['mean_running']:9.1f}{paging / row['mean_running']:10.2f}x"
            f"{f'{ratio:.1f}x' if has_paper else '':>8}{row['percent_of_memory_with_tokens']:11.1f}"
            f"{PAPER_TOKENS[policy] if has_paper else '':>8}{row['num_steps']:8d}"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("bench.paper.batching", __doc__)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--num-slots", type=int, default=15_700, help="tokens whose keys and values fit in memory")
    parser.add_argument("--prompt-mean", type=float, default=161)
    parser.add_argument("--output-mean", type=float, default=338)
    parser.add_argument("--max-num-seqs", type=int, default=128, help="above what memory allows, so that it bounds")
    args = parse_sized(parser, argv, SMALL)
    if args.num_requests < 1 or args.num_slots < MAX_MODEL_LEN:
        parser.error(f"--num-requests must be 1 or more, and --num-slots {MAX_MODEL_LEN} or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    rows = measure(args)
    print_report(rows)
    result = describe("bench.paper.batching", arguments, args)
    result |= {"num_requests": args.num_requests, "num_slots": args.num_slots, "rows": rows}
    result |= {"paper_requests": PAPER_REQUESTS, "paper_percent_of_memory_with_tokens": PAPER_TOKENS}
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
