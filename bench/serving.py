"""What does the server cost beside the engine alone, with 64 streams at once, and how soon is it ready?

The same requests, greedy and of forced lengths, are given to the offline engine and, streamed, to `jaxpaged serve`, in
turn; engine, server and client are processes of their own, and the client (raw sockets, one thread) shares the cores
with the server, so the CPU time of each is told. Both sides make text, and find no prompt in their prefix cache. Regime
of the work: as `bench.offline` (compute-bound on a CPU). Ceiling: the offline engine's rate; the bar is 90 % of it.
Readiness: from the start of the process to the event "ready", every bucket warm, with programs in the compilation
cache from a run before (bar: 15 s), and then the programs that some requests of many kinds had compiled (bar: none).

    python -m bench.serving --shape 110M --output bench/results/serving.json
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.contest import as_arguments
from bench.record import describe_run, note, write_result
from bench.shapes import DTYPES, SHAPES, LlamaShape, write_model
from bench.worker import PROJECT_ROOT, Worker
from bench.workloads import BenchRequest, sharegpt_like

BAR_RATIO, BAR_READY_S = 0.9, 15.0
START_TIMEOUT_S = 1800.0
KINDS: Sequence[dict[str, Any]] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 1, "n": 2},
    {"temperature": 1, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 3},
    {"temperature": 0, "stop": ["\n"], "logit_bias": {"5": 1}, "bad_words": ["thou"]},
    {"temperature": 0, "echo": True, "logprobs": 1},
)
"""Requests of many kinds, which a server that is ready answers without a compile."""


class ServerProcess:
    """`jaxpaged serve`, from its start until it is told to end."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        self._started_s = time.perf_counter()
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxpaged", "serve", *arguments, "--port", "0"], cwd=PROJECT_ROOT, stderr=stderr
            )
        try:
            self.ready_s = self._wait_for("ready")["at_s"]
            found = re.search(r":(\d+)$", self._wait_for("listening")["url"])
            assert found is not None
            self.port = int(found.group(1))
        except BaseException:
            self.close()
            raise

    def _wait_for(self, event: str) -> dict[str, Any]:
        """The log line of an event, and when it was seen, in seconds from the start."""
        while time.perf_counter() - self._started_s < START_TIMEOUT_S:
            has_ended = self.process.poll() is not None
            for line in self._log.read_text(errors="replace").splitlines():
                if line.startswith("{") and line.endswith("}") and json.loads(line).get("event") == event:
                    return json.loads(line) | {"at_s": time.perf_counter() - self._started_s}
            if has_ended:
                break
            time.sleep(0.01)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"the server is not {event}: {lines[-1] if lines else 'it said nothing'}")

    def cpu_s(self) -> float | None:
        """CPU seconds of all its threads so far; None where the system has no /proc."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.exists():
            return None
        # behind the name, which may hold anything: state is field 3, user and system time 14 and 15
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(name + "{"):
                    return float(line.rsplit(" ", 1)[1])
        raise RuntimeError(f"the server has no metric {name}")

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def close(self) -> int:
        """Tell it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure_readiness(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds until the demo model is ready: once to fill the compilation cache, then `repeats` times."""
    seconds, compiles, codes = [], [], []
    for number in range(repeats + 1):
        server = ServerProcess(["demo"], folder / f"ready{number}.log")
        try:
            seconds.append(server.ready_s)
            for kind in KINDS:
                server.complete({"prompt": "ROMEO:\n", "max_tokens": 20, **kind})
            compiles.append(server.metric("jaxpaged:compiles_after_ready_total"))
        finally:
            codes.append(server.close())
        note(f"[demo] ready after {seconds[-1]:.1f} s, {compiles[-1]:.0f} compiles behind that")
    return {
        "first_s": seconds[0],
        "warm_s": seconds[1:],
        "median_warm_s": median(seconds[1:]),
        "bar_s": BAR_READY_S,
        "num_compiles_after_ready": max(compiles),
        "exit_codes": codes,
    }


def bodies_of(requests: Sequence[BenchRequest], salt: str) -> list[dict[str, Any]]:
    """The same work over HTTP; a salt of its own keeps a run out of the prefix cache of the one before."""
    return [
        {
            "prompt": list(request.prompt_token_ids), "max_tokens": request.max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, "cache_salt": salt,
        }
        for request in requests
    ]  # fmt: skip


def serve_once(server: ServerProcess, client: Worker, requests: Sequence[BenchRequest], salt: str) -> dict[str, Any]:
    """One run over HTTP. ValueError unless every stream had exactly its tokens."""
    cpu_before = server.cpu_s()
    reply = client.call("run", port=server.port, bodies=bodies_of(requests, salt))
    cpu_after = server.cpu_s()
    server_cpu_s = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    for index, (request, stream) in enumerate(zip(requests, reply["streams"], strict=True)):
        num_tokens = stream["usage"]["completion_tokens"]
        if num_tokens != request.max_tokens:
            raise ValueError(f"stream {index} had {num_tokens} tokens instead of {request.max_tokens}: not comparable")
    num_tokens = sum(request.max_tokens for request in requests)
    return reply | {
        "tokens_per_s": num_tokens / reply["elapsed_s"], "client_cpu_s": reply["cpu_s"], "server_cpu_s": server_cpu_s,
    }


def latencies(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Percentiles over all streams of all runs: seconds to the first piece, and between pieces."""
    times = [stream["times_s"] for run in runs for stream in run["streams"]]
    first = [one[0] for one in times]
    between = np.concatenate([np.diff(one) for one in times])
    found: dict[str, float] = {}
    for name, values in (("ttft", first), ("itl", between)):
        for percent in (50, 99):
            found[f"{name}_p{percent}_s"] = float(np.percentile(values, percent)) if len(values) else 0.0
    return found


def measure_shape(shape: LlamaShape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The engine alone and the server, in turn, on one shape."""
    requests = sharegpt_like(num_requests=args.num_requests, vocab_size=shape.vocab_size, seed=args.seed)
    num_tokens = sum(request.max_tokens for request in requests)
    note(f"[{shape.name}] writing {shape.num_params / 1e6:.0f}M random parameters")
    model = write_model(shape, folder / "model", dtype=args.dtype, seed=args.seed)
    options = {"max_num_seqs": args.max_num_seqs, "max_model_len": shape.max_position_embeddings}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with ExitStack() as stack:
        engine = stack.enter_context(Worker(sys.executable, "bench.engine_worker", folder / "engine.log"))
        facts = engine.call("load", folder=str(model), dtype=args.dtype, options=options)
        server = stack.enter_context(ServerProcess([str(model), "--dtype", args.dtype, *flags], folder / "server.log"))
        client = stack.enter_context(Worker(sys.executable, "bench.stream_client", folder / "client.log"))
        note(f"[{shape.name}] server ready after {server.ready_s:.1f} s; warming up")
        alone = engine.call("generate", **as_arguments(requests), detokenize=True)
        served = serve_once(server, client, requests, "warm-up")
        same = sum(
            stream["text"] == text for stream, text in zip(served["streams"], alone["texts"], strict=True)
        )
        offline_runs, served_runs = [], []
        for number in range(1, args.repeats + 1):
            offline_runs.append(engine.call("generate", **as_arguments(requests), detokenize=True))
            served_runs.append(serve_once(server, client, requests, f"round {number}"))
            rates = num_tokens / offline_runs[-1]["elapsed_s"], served_runs[-1]["tokens_per_s"]
            note(f"[{shape.name}] round {number}: offline {rates[0]:.1f}, served {rates[1]:.1f} tokens/s")
        num_compiles = server.metric("jaxpaged:compiles_after_ready_total")
        versions = engine.versions
    return result_of(offline_runs, served_runs, num_tokens) | {
        "shape": shape.name,
        "dtype": args.dtype,
        "device": facts["device"],
        "versions": versions,
        "num_streams": len(requests),
        "num_tokens": num_tokens,
        "num_streams_with_the_same_text": same,
        "num_compiles_after_ready": num_compiles,
    }


def result_of(
    offline_runs: Sequence[dict[str, Any]], served_runs: Sequence[dict[str, Any]], num_tokens: int
) -> dict[str, Any]:
    """Medians, the ratio of each round, CPU time and latencies."""
    offline = [num_tokens / run["elapsed_s"] for run in offline_runs]
    served = [run["tokens_per_s"] for run in served_runs]
    return {
        "offline_tokens_per_s": offline,
        "served_tokens_per_s": served,
        "ratio": median(served) / median(offline),
        "ratios": [after / before for before, after in zip(offline, served, strict=True)],
        "bar_ratio": BAR_RATIO,
        "offline_cpu_s": median(run["cpu_s"] for run in offline_runs),
        "server_cpu_s": median(run["server_cpu_s"] for run in served_runs) if served_runs[0]["server_cpu_s"] else None,
        "client_cpu_s": median(run["client_cpu_s"] for run in served_runs),
        "num_pieces": sum(len(stream["times_s"]) for stream in served_runs[-1]["streams"]),
        **latencies(served_runs),
    }


def print_report(result: dict[str, Any]) -> None:
    """A table for people."""
    serving, ready = result["serving"], result["readiness"]
    if serving is not None:
        rates = [median(serving[name]) for name in ("offline_tokens_per_s", "served_tokens_per_s")]
        print(f"{serving['shape']}, {serving['num_streams']} streams, {serving['num_tokens']} tokens a run")
        print(f"  offline {rates[0]:8.1f} tokens/s   CPU {serving['offline_cpu_s']:.1f} s")
        server_cpu = "?" if serving["server_cpu_s"] is None else f"{serving['server_cpu_s']:.1f}"
        print(f"  served  {rates[1]:8.1f} tokens/s   CPU {server_cpu} s server, {serving['client_cpu_s']:.1f} s client")
        print(f"  ratio   {serving['ratio']:8.3f} (bar {BAR_RATIO})")
        for name, label in (("ttft", "first token"), ("itl", "between pieces")):
            p50_ms, p99_ms = (serving[f"{name}_p{percent}_s"] * 1e3 for percent in (50, 99))
            print(f"  {label}: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms")
    if ready is not None:
        print(f"demo ready after {ready['median_warm_s']:.1f} s warm (bar {BAR_READY_S:g}), {ready['first_s']:.1f} s "
              f"the first time; {ready['num_compiles_after_ready']:.0f} compiles behind that")  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of weights, keys and values")
    parser.add_argument("--num-requests", type=int, default=64, help="streams at once")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="as of LLM")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of offline and served; warm starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=("readiness", "streams"), help="leave one half out")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if min(args.num_requests, args.repeats, args.max_num_seqs) < 1:
        parser.error("--num-requests, --repeats and --max-num-seqs must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parse(arguments)
    result = describe_run("bench.serving", arguments) | {"readiness": None, "serving": None}
    with tempfile.TemporaryDirectory() as folder:
        if args.without != "readiness":
            result["readiness"] = measure_readiness(Path(folder), args.repeats)
        if args.without != "streams":
            result["serving"] = measure_shape(SHAPES[args.shape], args, Path(folder))
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
