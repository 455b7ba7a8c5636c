"""Engine against peers: each a process of its own, loaded once, given the same requests in turn."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.record import note
from bench.worker import Worker
from bench.workloads import BenchRequest, static_batches

STATIC_BATCH_SIZES = (8, 16, 32, 64)
CONTINUOUS_BATCH_TOKENS = (256, 1024)
"""Token budgets a step of continuous batching; the best counts."""
SINGLE_PROMPT_LEN, SINGLE_OUTPUT_LEN = 160, 128

Reply = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """One way to run a peer: a call of its worker and the arguments beyond the requests."""

    name: str
    call: str = "generate"
    arguments: dict[str, Any] = field(default_factory=dict)


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


def transformers_configs(requests: Sequence[BenchRequest]) -> list[PeerConfig]:
    """Every static configuration, and continuous batching."""
    configs = []
    for name, (batch_size, is_sorted) in static_names(len(requests)).items():
        batches = static_batches(requests, batch_size, is_sorted=is_sorted)
        configs.append(PeerConfig(name=name, call="static", arguments={"batches": batches}))
    for name, num_tokens in continuous_names().items():
        configs.append(PeerConfig(name=name, call="continuous", arguments={"max_batch_tokens": num_tokens}))
    return configs


TRANSFORMERS_ALONE = PeerConfig(name="single", call="static", arguments={"batches": [[0]]})


def checked(requests: Sequence[BenchRequest], reply: Reply) -> Reply:
    """The reply with its throughput; ValueError unless every request got exactly the tokens it asked for.

    A peer that cannot say which tokens came says how many, as `num_tokens`.
    """
    nums = reply["num_tokens"] if "num_tokens" in reply else [len(ids) for ids in reply["token_ids"]]
    for index, (request, num) in enumerate(zip(requests, nums, strict=True)):
        if num != request.max_tokens:
            raise ValueError(f"request {index} got {num} tokens instead of {request.max_tokens}: not comparable")
    return reply | {"tokens_per_s": sum(request.max_tokens for request in requests) / reply["elapsed_s"]}


def as_arguments(requests: Sequence[BenchRequest]) -> dict[str, Any]:
    return {
        "prompts": [list(request.prompt_token_ids) for request in requests],
        "max_tokens": [request.max_tokens for request in requests],
    }


def decode_rate(run: Callable[[list[BenchRequest]], Reply], prompt: tuple[int, ...]) -> float:
    """Tokens a second of one sequence, its prefill taken out: the time of N + 1 tokens less the time of one."""
    one = run([BenchRequest(prompt_token_ids=prompt, max_tokens=1)])["elapsed_s"]
    many = run([BenchRequest(prompt_token_ids=prompt, max_tokens=SINGLE_OUTPUT_LEN + 1)])["elapsed_s"]
    return SINGLE_OUTPUT_LEN / (many - one)


class Contestant:
    """A worker process that has loaded the model, and the ways to run it.

    Args:
        name: As reports show it.
        single: How one request is run alone.
    """

    def __init__(
        self, name: str, worker: Worker, facts: dict[str, Any], configs: Sequence[PeerConfig], single: PeerConfig
    ) -> None:
        self.name = name
        self.worker = worker
        self.facts = facts
        """What its `load` said."""
        self.configs = list(configs)
        self.single = single

    def run(self, config: PeerConfig, requests: Sequence[BenchRequest]) -> Reply:
        return checked(requests, self.worker.call(config.call, **as_arguments(requests), **config.arguments))

    def decode_rate(self, prompt: tuple[int, ...]) -> float:
        return decode_rate(lambda requests: self.run(self.single, requests), prompt)

    def warm_up(self, requests: Sequence[BenchRequest]) -> None:
        """Two tokens of every request in every configuration, for a peer that compiles nothing."""
        short = [replace(request, max_tokens=2) for request in requests]
        for config in self.configs:
            self.run(config, short)


GENERATE = PeerConfig(name="generate")


def load_contestant(
    name: str, python: str, module: str, log: Path, stack: ExitStack, *, configs: Sequence[PeerConfig] = (GENERATE,),
    single: PeerConfig = GENERATE, **load: Any,
) -> Contestant:  # fmt: skip
    """Start `python -m module` and let it load; WorkerError with its own words where it cannot."""
    worker = stack.enter_context(Worker(python, module, log))
    return Contestant(name, worker, worker.call("load", **load), configs, single)


def load_engine(python: str, log: Path, stack: ExitStack, **load: Any) -> Contestant:
    return load_contestant("jaxpaged", python, "bench.engine_worker", log, stack, **load)


def warm_up_engine(engine: Contestant, requests: Sequence[BenchRequest], single_prompt: tuple[int, ...]) -> float:
    """Seconds of the engine's first runs, which compile what the workload reaches."""
    start = time.perf_counter()
    engine.run(GENERATE, requests)
    engine.decode_rate(single_prompt)
    return time.perf_counter() - start


def play(
    engine: Contestant, peers: Sequence[Contestant], requests: Sequence[BenchRequest],
    peer_requests: Sequence[BenchRequest], repeats: int,
) -> tuple[list[Reply], dict[tuple[str, str], list[Reply]]]:  # fmt: skip
    """Replies of the engine and of each (peer, configuration): engine, peer, engine, next peer, ... in every round."""
    engine_runs: list[Reply] = []
    peer_runs: dict[tuple[str, str], list[Reply]] = {}
    turns = [(peer, config) for peer in peers for config in peer.configs]
    for round_number in range(1, repeats + 1):
        for peer, config in turns or [(None, None)]:
            engine_runs.append(engine.run(GENERATE, requests))
            note(f"round {round_number}, {engine.name}: {engine_runs[-1]['tokens_per_s']:.1f} tokens/s")
            if peer is not None and config is not None:
                reply = peer.run(config, peer_requests)
                peer_runs.setdefault((peer.name, config.name), []).append(reply)
                note(f"round {round_number}, {peer.name} {config.name}: {reply['tokens_per_s']:.1f} tokens/s")
    return engine_runs, peer_runs
