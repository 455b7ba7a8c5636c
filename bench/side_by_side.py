"""How many tokens a second does the engine give beside each peer, with the same weights, prompts and output lengths?

Bound by compute batched, by memory bandwidth alone. Peers: transformers (`generate` and continuous batching),
llama.cpp, vLLM, any OpenAI-compatible server. Each is a process of its own under the interpreter that the user names,
so that its environment never meets ours; one that cannot be loaded is skipped, and the result says why. Random-weight
Llama shapes, forced lengths, greedy; every configuration of a peer is listed, the best counts, and runs take turns
with the engine's. Ratios are formed at equal precision only: 8-bit weights are listed, and not raced against.

    python -m bench.side_by_side --peer transformers=python --peer llama_cpp=/path/to/its/python --shape 110M
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.contest import (
    GENERATE,
    SINGLE_PROMPT_LEN,
    TRANSFORMERS_ALONE,
    Contestant,
    PeerConfig,
    Reply,
    load_contestant,
    load_engine,
    play,
    transformers_configs,
    warm_up_engine,
)
from bench.record import describe_run, note, save_result, write_result
from bench.report import agreement, spread
from bench.shapes import DTYPES, SHAPES, LlamaShape, write_model
from bench.worker import WorkerError
from bench.workloads import BenchRequest, sharegpt_like

MAX_NUM_SEQS = 64


def llama_cpp_configs(requests: Sequence[BenchRequest]) -> list[PeerConfig]:
    """Slots that run at once, each with a stretch of the KV cache of its own or all in one."""
    return [
        PeerConfig(name=f"slots-{num_slots}{'-unified' if is_unified else ''}",
                   arguments={"num_slots": num_slots, "is_unified": is_unified})
        for num_slots in (16, 32, 64) if num_slots <= max(16, len(requests)) for is_unified in (False, True)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PeerKind:
    """How a peer is run."""

    module: str
    configs: Callable[[Sequence[BenchRequest]], list[PeerConfig]] = lambda requests: [GENERATE]
    single: PeerConfig = GENERATE
    weights: dict[str, tuple[str, ...]] | None = None
    """By dtype, the types of weights to load in turn; the first is the dtype itself. None: as the folder has them."""


PEERS = {
    "transformers": PeerKind(
        module="bench.peers.transformers_peer", configs=transformers_configs, single=TRANSFORMERS_ALONE
    ),
    "llama_cpp": PeerKind(
        module="bench.peers.llama_cpp_peer", configs=llama_cpp_configs,
        single=PeerConfig(name="single", arguments={"num_slots": 1, "is_unified": False}),
        weights={"float32": ("f32",), "bfloat16": ("bf16", "f16", "q8_0")},
    ),
    "vllm": PeerKind(module="bench.peers.vllm_peer"),
    "openai": PeerKind(module="bench.peers.openai_peer"),
}  # fmt: skip
UNEQUAL = ("q8_0",)
"""Weights of another precision than the engine's."""


def peer_options(name: str, weights: str | None, shape: LlamaShape, args: argparse.Namespace) -> dict[str, Any]:
    """What a peer's `load` is told beyond the folder."""
    if name == "llama_cpp":
        return {"weights": weights, "max_model_len": shape.max_position_embeddings}
    if name == "vllm":
        return {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": shape.max_position_embeddings}
    return {"base_url": args.base_url} if name == "openai" else {}


def load_peers(
    shape: LlamaShape, dtype: str, requests: Sequence[BenchRequest], args: argparse.Namespace, folder: Path,
    stack: ExitStack,
) -> tuple[list[Contestant], dict[str, str]]:  # fmt: skip
    """Those that load, and why the others do not."""
    peers: list[Contestant] = []
    skipped: dict[str, str] = {}
    for kind_name, python in args.peers.items():
        kind = PEERS[kind_name]
        configs = [c for c in kind.configs(requests) if not args.configs or c.name in args.configs]
        for weights in kind.weights[dtype] if kind.weights else (None,):
            name = f"{kind_name} {weights}" if weights else kind_name
            try:
                peers.append(
                    load_contestant(
                        name, python, kind.module, folder / f"{name}.log", stack, configs=configs, single=kind.single,
                        folder=str(folder), dtype=dtype, options=peer_options(kind_name, weights, shape, args),
                    )  # fmt: skip
                )
            except WorkerError as error:
                skipped[name] = str(error)
                note(f"{name} is skipped: {error}")
    return peers, skipped


def rows_of(
    engine_runs: Sequence[Reply], peer_runs: dict[tuple[str, str], list[Reply]]
) -> list[dict[str, Any]]:
    """A row for each peer and configuration: its throughput, and how many times it the engine gives."""
    ours = statistics.median(run["tokens_per_s"] for run in engine_runs)
    rows = []
    for (peer, config), runs in peer_runs.items():
        theirs = spread([run["tokens_per_s"] for run in runs])
        has_tokens = "token_ids" in runs[0]
        rows.append({
            "peer": peer, "config": config, "tokens_per_s": theirs, "ratio": ours / theirs["median"],
            "is_equal_precision": not peer.endswith(UNEQUAL),
            "agreement": agreement(engine_runs[0]["token_ids"], runs[0]["token_ids"]) if has_tokens else None,
        })  # fmt: skip
    for name in {row["peer"] for row in rows}:
        best = min((row for row in rows if row["peer"] == name), key=lambda row: row["ratio"])
        best["is_best"] = True
    return rows


def measure(shape: LlamaShape, dtype: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one precision."""
    requests = sharegpt_like(num_requests=args.num_requests, vocab_size=shape.vocab_size, seed=args.seed)
    prompt = sharegpt_like(
        num_requests=1, vocab_size=shape.vocab_size, prompt_mean=SINGLE_PROMPT_LEN, seed=args.seed + 1
    )[0].prompt_token_ids
    write_model(shape, folder, dtype=dtype, seed=args.seed)
    with ExitStack() as stack:
        options = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": shape.max_position_embeddings}
        engine = load_engine(
            sys.executable, folder / "engine.log", stack, folder=str(folder), dtype=dtype, options=options
        )
        peers, skipped = load_peers(shape, dtype, requests, args, folder, stack)
        warm_up_s = warm_up_engine(engine, requests, prompt)
        for peer in peers:
            peer.warm_up(requests)
        engine_runs, peer_runs = play(engine, peers, requests, requests, args.repeats)
        single: dict[str, list[float]] = {one.name: [] for one in (engine, *peers)}
        for _ in range(args.repeats):
            for one in (engine, *peers):
                single[one.name].append(one.decode_rate(prompt))
        facts = {one.name: {**one.facts, **one.worker.call("finish")} for one in (engine, *peers)}
        versions = {one.name: one.worker.versions for one in (engine, *peers)}
    ours = statistics.median(single[engine.name])
    return {
        "shape": asdict(shape), "dtype": dtype, "num_requests": len(requests), "versions": versions, "facts": facts,
        "skipped": skipped, "warm_up_s": warm_up_s,
        "engine_tokens_per_s": spread([run["tokens_per_s"] for run in engine_runs]),
        "peers": rows_of(engine_runs, peer_runs),
        "batch_1": [
            {"peer": name, "tokens_per_s": spread(rates), "ratio": ours / statistics.median(rates)}
            for name, rates in single.items()
        ],
    }  # fmt: skip


def print_report(result: dict[str, Any]) -> None:
    """The tables for people."""
    for entry in result["precisions"]:
        engine = entry["engine_tokens_per_s"]
        print(f"\n== {entry['shape']['name']} {entry['dtype']}, {entry['num_requests']} requests at once")
        print(f"{'tokens/s':<44}{'median':>9}{'min':>9}{'max':>9}{'runs':>6}{'jaxpaged is':>13}{'same tokens':>13}")
        print(f"{'jaxpaged':<44}{engine['median']:9.1f}{engine['min']:9.1f}{engine['max']:9.1f}{engine['num_runs']:6d}")
        for row in entry["peers"]:
            theirs = row["tokens_per_s"]
            ratio = f"{row['ratio']:.2f}x" if row["is_equal_precision"] else "other bits"
            same = f"{100 * row['agreement']['equal_requests']:.0f} %" if row["agreement"] else "not told"
            name = f"{row['peer']} {row['config']}{' (its best)' if row.get('is_best') else ''}"
            print(f"{name:<44}{theirs['median']:9.1f}{theirs['min']:9.1f}{theirs['max']:9.1f}{theirs['num_runs']:6d}"
                  f"{ratio:>13}{same:>13}")
        for row in entry["batch_1"]:
            theirs = row["tokens_per_s"]
            ratio = "" if row["peer"] == "jaxpaged" else f"{row['ratio']:.2f}x"
            ratio = "other bits" if row["peer"].endswith(UNEQUAL) else ratio
            print(f"{'one sequence: ' + row['peer']:<44}{theirs['median']:9.1f}{theirs['min']:9.1f}{theirs['max']:9.1f}"
                  f"{theirs['num_runs']:6d}{ratio:>13}")
        for name, reason in entry["skipped"].items():
            print(f"skipped: {name}: {reason}")


def read_peers(named: Sequence[str], base_url: str | None) -> dict[str, str]:
    """Peer and interpreter, of NAME=PYTHON or NAME for this interpreter; all that are known if none is named."""
    peers: dict[str, str] = {}
    for text in named or [name for name in PEERS if name != "openai"]:
        name, _, python = text.partition("=")
        if name not in PEERS:
            raise ValueError(f"--peer {name} is not known: choose among {', '.join(PEERS)}")
        peers[name] = python or sys.executable
    if base_url is not None:
        peers.setdefault("openai", sys.executable)
    elif "openai" in peers:
        raise ValueError("--peer openai needs --base-url, the address of a server, e.g. http://localhost:8000/v1")
    return peers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.side_by_side", description=description)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=PYTHON]",
                        help=f"one of {', '.join(PEERS)}, and the interpreter that has it; may be given again")
    parser.add_argument("--base-url", help="an OpenAI-compatible server that serves the folder of --write-model")
    parser.add_argument("--write-model", type=Path, metavar="FOLDER",
                        help="write the model of the shape, dtype and seed for a server to load, and end")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="only these, e.g. static-32-sorted slots-64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.num_requests < 1:
        parser.error("--repeats and --num-requests must be 1 or more")
    some = sharegpt_like(num_requests=args.num_requests, vocab_size=100)
    known = {config.name for kind in PEERS.values() for config in kind.configs(some)}
    for name in args.configs or ():
        if name not in known:
            parser.error(f"--configs {name} is not known: choose among {', '.join(sorted(known))}")
    try:
        args.peers = read_peers(args.peer, args.base_url)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    shape = SHAPES[args.shape]
    if args.write_model is not None:
        write_model(shape, args.write_model, dtype=args.dtype[0], seed=args.seed)
        note(f"wrote {args.write_model}: serve it, and give its server as --base-url with --dtype {args.dtype[0]}")
        return 0
    result: dict[str, Any] = {**describe_run("bench.side_by_side", arguments), "seed": args.seed, "precisions": []}
    with tempfile.TemporaryDirectory(prefix="bench-side-by-side-") as scratch:
        for dtype in args.dtype:
            result["precisions"].append(measure(shape, dtype, args, Path(scratch) / dtype))
            save_result(result, args.output)
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
