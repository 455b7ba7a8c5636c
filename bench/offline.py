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
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.record import describe_run, note, write_result
from bench.report import batch_1_result, print_report, throughput_result
from bench.shapes import DTYPES, SHAPES, LlamaShape, write_model
from bench.worker import Worker, WorkerError
from bench.workloads import BenchRequest, sharegpt_like, static_batches

STATIC_BATCH_SIZES = (8, 16, 32, 64)
CONTINUOUS_BATCH_TOKENS = (256, 1024)
"""Token budgets a step of continuous batching; the best counts."""
SINGLE_PROMPT_LEN, SINGLE_OUTPUT_LEN = 160, 128


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One way to run the peer: a call of its worker and the arguments beyond the requests."""

    name: str
    call: str
    arguments: dict[str, Any]


def static_names(num_requests: int) -> dict[str, tuple[int, bool]]:
    """Batch size, and whether sorted, of each static configuration: both orders, one where a batch holds all."""
    return {
        f"static-{size}-{'sorted' if is_sorted else 'arrival'}": (size, is_sorted)
        for size in STATIC_BATCH_SIZES
        for is_sorted in ((False, True) if size < num_requests else (False,))
    }


def continuous_names() -> dict[str, int]:
    """Tokens a step of each continuous configuration."""
    return {f"continuous-{num_tokens}": num_tokens for num_tokens in CONTINUOUS_BATCH_TOKENS}


def peer_configs(requests: Sequence[BenchRequest]) -> list[PeerConfig]:
    """Every static configuration, and continuous batching."""
    configs = []
    for name, (batch_size, is_sorted) in static_names(len(requests)).items():
        batches = static_batches(requests, batch_size, is_sorted=is_sorted)
        configs.append(PeerConfig(name=name, call="static", arguments={"batches": batches}))
    for name, num_tokens in continuous_names().items():
        configs.append(PeerConfig(name=name, call="continuous", arguments={"max_batch_tokens": num_tokens}))
    return configs


def checked(requests: Sequence[BenchRequest], reply: dict[str, Any]) -> dict[str, Any]:
    """The reply with its throughput; ValueError unless every request got exactly the tokens it asked for."""
    for index, (request, ids) in enumerate(zip(requests, reply["token_ids"], strict=True)):
        if len(ids) != request.max_tokens:
            raise ValueError(f"request {index} got {len(ids)} tokens instead of {request.max_tokens}: not comparable")
    return reply | {"tokens_per_s": sum(request.max_tokens for request in requests) / reply["elapsed_s"]}


def as_arguments(requests: Sequence[BenchRequest]) -> dict[str, Any]:
    return {
        "prompts": [list(request.prompt_token_ids) for request in requests],
        "max_tokens": [request.max_tokens for request in requests],
    }


def decode_rate(run: Callable[[list[BenchRequest]], dict[str, Any]], prompt: tuple[int, ...]) -> float:
    """Tokens a second of one sequence, its prefill taken out: the time of N + 1 tokens less the time of one."""
    one = run([BenchRequest(prompt_token_ids=prompt, max_tokens=1)])["elapsed_s"]
    many = run([BenchRequest(prompt_token_ids=prompt, max_tokens=SINGLE_OUTPUT_LEN + 1)])["elapsed_s"]
    return SINGLE_OUTPUT_LEN / (many - one)


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
        self.engine = stack.enter_context(Worker(sys.executable, "bench.engine_worker", folder / "engine.log"))
        self.engine_facts = self.engine.call("load", **model, options=options)
        self.configs: list[PeerConfig] = []
        self.peer: Worker | None = None
        self.peer_facts: dict[str, Any] = {}
        self.peer_skipped: str | None = None
        try:
            peer = stack.enter_context(Worker(args.peer_python, "bench.peers.transformers_peer", folder / "peer.log"))
            self.peer_facts = peer.call("load", **model, options={})
        except WorkerError as error:
            self.peer_skipped = str(error)
            note(f"[{shape.name}] the peer is skipped: {self.peer_skipped}")
        else:
            self.peer = peer
            self.configs = [c for c in peer_configs(self.peer_requests) if not args.configs or c.name in args.configs]

    def run_engine(self, requests: Sequence[BenchRequest]) -> dict[str, Any]:
        return checked(requests, self.engine.call("generate", **as_arguments(requests)))

    def run_peer(self, config: PeerConfig, requests: Sequence[BenchRequest]) -> dict[str, Any]:
        assert self.peer is not None
        return checked(requests, self.peer.call(config.call, **as_arguments(requests), **config.arguments))

    def engine_decode_rate(self) -> float:
        return decode_rate(self.run_engine, self.single_prompt)

    def peer_decode_rate(self) -> float:
        alone = PeerConfig(name="single", call="static", arguments={"batches": [[0]]})
        return decode_rate(lambda requests: self.run_peer(alone, requests), self.single_prompt)

    def warm_up(self) -> float:
        """Seconds of the engine's first runs, which compile what the workload reaches. The peer, which compiles

        nothing, does two tokens of every request in every configuration.
        """
        start = time.perf_counter()
        self.run_engine(self.requests)
        self.engine_decode_rate()
        warm_up_s = time.perf_counter() - start
        note(f"[{self.name}] jaxpaged: loaded in {self.engine_facts['load_s']:.1f} s, first runs {warm_up_s:.1f} s")
        short = [replace(request, max_tokens=2) for request in self.peer_requests]
        for config in self.configs:
            self.run_peer(config, short)
        return warm_up_s

    def play(self, repeats: int) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Replies of the engine and of each peer configuration: engine, peer, engine, next peer, ... in every round."""
        engine_runs: list[dict[str, Any]] = []
        peer_runs: dict[str, list[dict[str, Any]]] = {config.name: [] for config in self.configs}
        for round_number in range(1, repeats + 1):
            configs: Sequence[PeerConfig | None] = self.configs or [None]
            for config in configs:
                engine_runs.append(self.run_engine(self.requests))
                self._say(round_number, "jaxpaged", engine_runs[-1])
                if config is not None:
                    peer_runs[config.name].append(self.run_peer(config, self.peer_requests))
                    self._say(round_number, config.name, peer_runs[config.name][-1])
        return engine_runs, peer_runs

    def play_single(self, repeats: int, ceilings: Worker) -> tuple[list[float], list[float], list[float]]:
        """Decode rates of one sequence alone, engine and peer in turn, and the memory bandwidth around the engine's.

        On a shared machine bandwidth changes within minutes, so its ceiling is measured beside what it bounds.
        """
        rates: list[float] = []
        peer_rates: list[float] = []
        bandwidths: list[float] = [ceilings.call("bandwidth")]
        for _ in range(repeats):
            rates.append(self.engine_decode_rate())
            bandwidths.append(ceilings.call("bandwidth"))
            if self.peer is not None:
                peer_rates.append(self.peer_decode_rate())
        note(f"[{self.name}] batch 1: {rates} and {peer_rates} tokens/s")
        return rates, peer_rates, bandwidths

    def _say(self, round_number: int, who: str, reply: dict[str, Any]) -> None:
        note(f"[{self.name}] round {round_number}, {who}: {reply['tokens_per_s']:.1f} tokens/s")


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
        engine = {**contest.engine_facts, "warm_up_s": warm_up_s, **contest.engine.call("finish")}
        peer = {**contest.peer_facts, **contest.peer.call("finish")} if contest.peer is not None else None
        versions = {**contest.engine.versions, **(contest.peer.versions if contest.peer is not None else {})}
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
