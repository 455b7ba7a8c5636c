"""How many tokens a second do beam searches give beside transformers', and what does a wider search cost?

The same prompts, number of new tokens and rule on both sides, nothing ends early; transformers is given all batch sizes
listed, and its best counts. A token is one of a hypothesis that is returned. What a search costs is also told per beam
and token, at the first width and at the widest. Regime: bandwidth with few beams, the matmul rate with many. Ceiling:
greedy decoding of as many sequences as there are beams, timed in the same rounds.

    python -m bench.beams --shape 110M --repeats 3 --output bench/results/beams.json
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import describe_run, note, write_result
from bench.report import agreement, spread
from bench.shapes import DTYPES, SHAPES, LlamaShape, write_model
from bench.worker import Worker, WorkerError

PEER_BATCH_SIZES = (1, 4, 16)
"""Searches of one `generate`."""


def make_prompts(num_prompts: int, mean_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of lengths from 7/8 to 9/8 of the mean, so that a padded batch loses little."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(mean_len - mean_len // 8, mean_len + mean_len // 8 + 1, num_prompts)
    return [rng.integers(3, vocab_size, length).tolist() for length in lens]


@dataclass
class Runs:
    """Seconds of each run by name, and one run's tokens."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    token_ids: dict[str, list[list[int]]] = field(default_factory=dict)

    def add(self, name: str, reply: dict[str, Any]) -> None:
        self.seconds.setdefault(name, []).append(reply["elapsed_s"])
        self.token_ids.setdefault(name, reply["token_ids"])
        note(f"  {name}: {reply['elapsed_s']:.2f} s")


def play(shape: LlamaShape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every round: each width of ours and greedy decoding of as many rows, then the peer."""
    note(f"[{shape.name}] writing {shape.num_params / 1e6:.0f}M random parameters")
    write_model(shape, folder, dtype=args.dtype, seed=args.seed)
    prompts = make_prompts(args.num_prompts, args.prompt_len, shape.vocab_size, args.seed)
    model = {"folder": str(folder), "dtype": args.dtype}
    rows = {width: width * len(prompts) for width in args.widths}
    options = {"max_num_seqs": max(rows.values()), "max_model_len": shape.max_position_embeddings}
    first = args.widths[0]
    runs = Runs()
    versions: dict[str, str] = {}
    skipped = None
    with Worker(sys.executable, "bench.engine_worker", folder / "engine.log") as engine:
        facts = engine.call("load", **model, options=options)
        versions |= engine.versions
        try:
            peer = Worker(args.peer_python, "bench.peers.transformers_peer", folder / "peer.log")
        except WorkerError as error:
            peer, skipped = None, str(error)
            note(f"the peer is skipped: {skipped}")

        def search(width: int) -> dict[str, Any]:
            return engine.call("beam_search", prompts=prompts, width=width, num_new_tokens=args.num_new_tokens)

        def greedy(width: int) -> dict[str, Any]:
            many = [prompt for prompt in prompts for _ in range(width)]
            return engine.call("generate", prompts=many, max_tokens=[args.num_new_tokens] * len(many))

        try:
            for width in args.widths:
                search(width)
                greedy(width)
            if peer is not None:
                versions |= peer.versions
                facts["peer"] = peer.call("load", **model, options={})
                peer.call("beam_search", prompts=prompts, width=first, num_new_tokens=2, batch_size=args.num_prompts)
            for round_number in range(1, args.repeats + 1):
                note(f"round {round_number}")
                for width in args.widths:
                    runs.add(f"width-{width}", search(width))
                    runs.add(f"greedy-{rows[width]}", greedy(width))
                for size in PEER_BATCH_SIZES if peer is not None else ():
                    assert peer is not None
                    reply = peer.call(
                        "beam_search", prompts=prompts, width=first, num_new_tokens=args.num_new_tokens, batch_size=size
                    )
                    runs.add(f"transformers-width-{first}-batch-{size}", reply)
            facts |= engine.call("finish")
        finally:
            if peer is not None:
                peer.close()
    return {"engine": facts, "versions": versions, "peer_skipped": skipped, **summary(runs, args, rows)}


def summary(runs: Runs, args: argparse.Namespace, rows: dict[int, int]) -> dict[str, Any]:
    """Seconds, rates, the best peer and its ratio, and microseconds per beam and token of each width."""
    first, widest = args.widths[0], args.widths[-1]
    medians = {name: statistics.median(seconds) for name, seconds in runs.seconds.items()}
    num_tokens = args.num_prompts * args.num_new_tokens
    cost = {width: 1e6 * medians[f"width-{width}"] / (rows[width] * args.num_new_tokens) for width in args.widths}
    peers = [name for name in medians if name.startswith("transformers")]
    best = min(peers, key=medians.__getitem__) if peers else None
    return {
        "seconds": {name: spread(seconds) for name, seconds in runs.seconds.items()},
        "tokens_per_s": {name: num_tokens / medians[name] for name in [f"width-{first}", *peers]},
        "best_peer": best,
        "ratio_to_best_peer": medians[best] / medians[f"width-{first}"] if best else None,
        "agreement": agreement(runs.token_ids[f"width-{first}"], runs.token_ids[best]) if best else None,
        "us_per_beam_and_token": cost,
        "cost_of_widest_to_first": cost[widest] / cost[first],
        "time_to_greedy": {
            width: medians[f"width-{width}"] / medians[f"greedy-{rows[width]}"] for width in args.widths
        },
    }


def print_report(result: dict[str, Any]) -> None:
    """The table for people."""
    shape, num_searches, num_tokens = (result[name] for name in ("shape", "num_prompts", "num_new_tokens"))
    print(f"{num_searches} searches of {num_tokens} new tokens, {shape} {result['dtype']}")
    for name, row in result["seconds"].items():
        print(f"  {name:34}{row['median']:8.2f} s   ({row['min']:.2f} to {row['max']:.2f})")
    for width, cost in result["us_per_beam_and_token"].items():
        ratio = result["time_to_greedy"][width]
        print(f"  width {width}: {cost:.0f} us per beam and token, {ratio:.2f}x greedy decoding of as many sequences")
    print(f"  widest against first width, per beam and token: {result['cost_of_widest_to_first']:.2f}x")
    if result["best_peer"] is None:
        print(f"  the peer was skipped: {result['peer_skipped']}")
    else:
        same = 100 * result["agreement"]["equal_requests"]
        print(f"  {result['ratio_to_best_peer']:.2f}x {result['best_peer']}; same best hypothesis in {same:.0f} %")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.beams", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128, help="mean tokens of a prompt")
    parser.add_argument("--num-new-tokens", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 16], help="the peer runs the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and transformers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args(argv)
    if min(args.num_prompts, args.num_new_tokens, args.repeats, *args.widths) < 1 or args.prompt_len < 8:
        parser.error("numbers must be 1 or more, and --prompt-len 8 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(prefix="bench-beams-") as scratch:
        measured = play(shape, args, Path(scratch))
    result = {
        **describe_run("bench.beams", arguments), "shape": args.shape, "dtype": args.dtype,
        "num_prompts": args.num_prompts, "prompt_len": args.prompt_len, "num_new_tokens": args.num_new_tokens,
        "seed": args.seed, **measured,
    }  # fmt: skip
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
