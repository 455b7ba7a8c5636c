"""How many tokens a second does the engine give when 64 chat-like requests lie ready, and how many do its peers?

Throughput is compute-bound on a CPU (its ceiling: the measured float32 matmul rate), batch-1 decode bandwidth-bound
(its ceiling: the measured rate of a read-only sum). Random-weight Llama shapes, lengths log-normal and forced, greedy.
Peers: transformers `generate` on static batches, every size and order listed and the best counted, and its continuous
batching. Each engine is a process of its own; runs are interleaved; a first run of each warms up and is not counted.

    python -m bench.offline --shape 15M 110M --repeats 3 --output bench/results/offline.json
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.contest import (
    SINGLE_OUTPUT_LEN,
    SINGLE_PROMPT_LEN,
    TRANSFORMERS_ALONE,
    Contestant,
    continuous_names,
    load_contestant,
    load_engine,
    play,
    static_names,
    transformers_configs,
    warm_up_engine,
)
from bench.record import describe_run, note, write_result
from bench.report import batch_1_result, print_report, throughput_result
from bench.shapes import DTYPES, SHAPES, LlamaShape, write_model
from bench.worker import Worker, WorkerError
from bench.workloads import sharegpt_like


class Contest:
    """The engine and the peer, each loaded in a process of its own, on one shape and one list of requests.

    They live for one shape only, so that peak memory is that of the shape.
    """

    def __init__(self, shape: LlamaShape, args: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.name = shape.name
        self.requests = sharegpt_like(num_requests=args.num_requests, vocab_size=shape.vocab_size, seed=args.seed)
        self.peer_requests = self.requests[: args.peer_requests]
        single = sharegpt_like(
            num_requests=1, vocab_size=shape.vocab_size, prompt_mean=SINGLE_PROMPT_LEN, seed=args.seed + 1
        )
        self.single_prompt = single[0].prompt_token_ids
        note(f"[{shape.name}] writing {shape.num_params / 1e6:.0f}M random parameters")
        write_model(shape, folder, dtype=args.dtype, seed=args.seed)
        model = {"folder": str(folder), "dtype": args.dtype}
        options = {"max_num_seqs": args.max_num_seqs, "max_model_len": shape.max_position_embeddings}
        if args.max_num_batched_tokens is not None:
            options["max_num_batched_tokens"] = args.max_num_batched_tokens
        self.engine = load_engine(sys.executable, folder / "engine.log", stack, **model, options=options)
        self.peers: list[Contestant] = []
        self.peer_skipped: str | None = None
        configs = [
            config for config in transformers_configs(self.peer_requests)
            if not args.configs or config.name in args.configs
        ]  # fmt: skip
        try:
            peer = load_contestant(
                "transformers", args.peer_python, "bench.peers.transformers_peer", folder / "peer.log", stack,
                configs=configs, single=TRANSFORMERS_ALONE, **model, options={},
            )  # fmt: skip
        except WorkerError as error:
            self.peer_skipped = str(error)
            note(f"[{shape.name}] the peer is skipped: {self.peer_skipped}")
        else:
            self.peers = [peer]

    def warm_up(self) -> float:
        """Seconds of the engine's first runs; the peer does two tokens of every request in every configuration."""
        warm_up_s = warm_up_engine(self.engine, self.requests, self.single_prompt)
        note(f"[{self.name}] jaxpaged: loaded in {self.engine.facts['load_s']:.1f} s, first runs {warm_up_s:.1f} s")
        for peer in self.peers:
            peer.warm_up(self.peer_requests)
        return warm_up_s

    def play(self, repeats: int) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Replies of the engine and of each peer configuration, in turn."""
        engine_runs, peer_runs = play(self.engine, self.peers, self.requests, self.peer_requests, repeats)
        return engine_runs, {config: runs for (_, config), runs in peer_runs.items()}

    def play_single(self, repeats: int, ceilings: Worker) -> tuple[list[float], list[float], list[float]]:
        """Decode rates of one sequence alone, engine and peer in turn, and the memory bandwidth around the engine's.

        On a shared machine bandwidth changes within minutes, so its ceiling is measured beside what it bounds.
        """
        rates: list[float] = []
        peer_rates: list[float] = []
        bandwidths: list[float] = [ceilings.call("bandwidth")]
        for _ in range(repeats):
            rates.append(self.engine.decode_rate(self.single_prompt))
            bandwidths.append(ceilings.call("bandwidth"))
            peer_rates += [peer.decode_rate(self.single_prompt) for peer in self.peers]
        note(f"[{self.name}] batch 1: {rates} and {peer_rates} tokens/s")
        return rates, peer_rates, bandwidths


def measure_shape(shape: LlamaShape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one shape, as it goes into the result."""
    with ExitStack() as stack:
        contest = Contest(shape, args, folder, stack)
        ceilings = stack.enter_context(Worker(sys.executable, "bench.ceilings", folder / "ceilings.log"))
        measured = [ceilings.call("measure")]
        warm_up_s = contest.warm_up()
        engine_runs, peer_runs = contest.play(args.repeats)
        rates, peer_rates, bandwidths = contest.play_single(max(args.repeats, 1 if args.quick else 3), ceilings)
        # the best of before and after: a ceiling measured in a slow moment would flatter
        measured.append(ceilings.call("measure"))
        best = {name: max(measurement[name] for measurement in measured) for name in measured[0]}
        engine = {**contest.engine.facts, "warm_up_s": warm_up_s, **contest.engine.worker.call("finish")}
        peer = next(({**each.facts, **each.worker.call("finish")} for each in contest.peers), None)
        versions = dict(contest.engine.worker.versions)
        for each in contest.peers:
            versions |= each.worker.versions
    return {
        "shape": asdict(shape) | {"num_params": shape.num_params},
        "versions": versions,
        "ceilings": best,
        "engine": engine,
        "peer": peer,
        "peer_skipped": contest.peer_skipped,
        "throughput": throughput_result(shape, contest.requests, engine_runs, peer_runs, engine["device"], best),
        "batch_1": batch_1_result(
            shape, args.dtype, len(contest.single_prompt), SINGLE_OUTPUT_LEN, rates, peer_rates, engine["device"],
            bandwidths,
        ),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["15M", "110M"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of weights, keys and values")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs every configuration once")
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="peer configurations, e.g. static-32-sorted")
    parser.add_argument("--peer-requests", type=int, help="only the first N for the peer (the result says so)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and transformers")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="as of LLM")
    parser.add_argument("--max-num-batched-tokens", type=int, help="as of LLM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round, 15M shape, 16 requests, two configurations")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if args.quick:
        args.shape = ["15M"] if args.shape == parser.get_default("shape") else args.shape
        args.num_requests, args.repeats = min(args.num_requests, 16), 1
        args.configs = args.configs or ["static-16-arrival", "continuous-256"]
    if args.repeats < 1 or (args.peer_requests is not None and args.peer_requests < 1):
        parser.error("--repeats and --peer-requests must be 1 or more")
    known = [*static_names(min(args.num_requests, args.peer_requests or args.num_requests)), *continuous_names()]
    for name in args.configs or ():
        if name not in known:
            parser.error(f"--configs {name} is not known: choose among {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    result: dict[str, Any] = {**describe_run("bench.offline", arguments), "dtype": args.dtype}
    result |= {"seed": args.seed, "is_quick": args.quick, "shapes": []}
    with tempfile.TemporaryDirectory(prefix="bench-offline-") as scratch:
        for name in args.shape:
            result["shapes"].append(measure_shape(SHAPES[name], args, Path(scratch) / name))
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
