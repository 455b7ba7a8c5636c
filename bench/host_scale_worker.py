"""A crowd in its steady state as a worker process, so that the garbage collector walks what is of this crowd only."""

import gc
import platform
import random
import tracemalloc
from dataclasses import dataclass
from typing import Any

from bench.host_loop import BLOCK_SIZE, CollectorClock, HostLoop, StepTimes
from bench.worker import peak_memory_bytes, serve
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import by_priority, first_come_first_served
from jaxpaged.core.request import Request

AGING_PROMPT_LEN = 2000
"""Tokens of the prompts that use every block of a pool once."""


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """A steady state of the host."""

    num_running: int
    num_blocks: int
    num_waiting: int
    context_len: int = 250
    """Prompt tokens of every request."""
    has_priorities: bool = False
    """Newcomers have one of ten priorities, so that they enter the queue anywhere; else first come, first served."""

    @property
    def turnover(self) -> int:
        """Requests that end, begin and arrive in a step."""
        return max(1, self.num_running // 100)


class Steady:
    """A loop brought to a crowd's steady state: every block used once, all rows taken, the queue full."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self._random = random.Random(0)
        self.loop = HostLoop(
            max_num_seqs=crowd.num_running, num_blocks=crowd.num_blocks,
            max_model_len=max(2048, crowd.context_len + 1024),
            order=by_priority if crowd.has_priorities else first_come_first_served,
        )  # fmt: skip
        self._use_every_block()
        for _ in range(crowd.num_running):
            self.loop.scheduler.add(self.loop.make_request(crowd.context_len))
        while not self.loop.is_full:
            self.loop.step(is_built=False)
        for _ in range(crowd.num_waiting):
            self.loop.scheduler.add(self._newcomer())
        for _ in range(5):
            self.step()

    def _use_every_block(self) -> None:
        loop, cache = self.loop, self.loop.scheduler.block_manager.prefix_cache
        for _ in range(-(-self.crowd.num_blocks // (AGING_PROMPT_LEN // BLOCK_SIZE))):
            loop.scheduler.add(loop.make_request(AGING_PROMPT_LEN, max_tokens=1))
        while loop.scheduler.has_unfinished:
            loop.step(is_built=False)
        if len(cache) < 0.95 * self.crowd.num_blocks:
            raise RuntimeError(f"only {len(cache)} of {self.crowd.num_blocks} blocks are in the prefix cache")

    def _newcomer(self) -> Request:
        priority = self._random.randrange(10) if self.crowd.has_priorities else 0
        return self.loop.make_request(self.crowd.context_len, priority=priority)

    def step(self) -> StepTimes:
        """A step with its turnover."""
        newcomers = [self._newcomer() for _ in range(self.crowd.turnover)]
        return self.loop.step(newcomers, num_to_end=self.crowd.turnover)


class HostScaleWorker:
    """Holds one crowd between calls."""

    def __init__(self) -> None:
        self._steady: Steady | None = None

    def prepare(self, **crowd: Any) -> None:
        self._steady = Steady(Crowd(**crowd))
        gc.collect()

    def run(self, num_steps: int) -> list[dict[str, float]]:
        """Milliseconds of each part of some steps, of the whole step, and of the garbage collector.

        The collector's are of all it did, also while the device's answer was made, which no part counts.
        """
        steady = self._steady
        assert steady is not None
        steps = []
        for _ in range(num_steps):
            with CollectorClock() as collector:
                times = steady.step()
            parts = {name: 1e3 * seconds for name, seconds in zip(StepTimes._fields, times, strict=True)}
            steps.append({**parts, "host": 1e3 * sum(times), "collector": 1e3 * collector.elapsed_s})
        counts, crowd = steady.loop.scheduler.counts(), steady.crowd
        if (counts.running, counts.waiting) != (crowd.num_running, crowd.num_waiting):
            raise RuntimeError(f"{counts} is not the state to measure: {crowd}")
        return steps

    def memory(self, **crowd: Any) -> dict[str, float]:
        """Bytes of Python objects for each block, waiting request and running sequence of a crowd."""
        return measure_memory(Crowd(**crowd))

    def finish(self) -> dict[str, Any]:
        """What is known at the end only."""
        return {"peak_memory_bytes": peak_memory_bytes()}


def measure_memory(crowd: Crowd) -> dict[str, float]:
    """Bytes that each block, cached block, waiting request and running sequence adds, by what Python allocated.

    The integers of prompt tokens are shared here; where every request brings its own they are the caller's, 28 bytes
    each above 256.
    """
    made: dict[str, float] = {}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    def added(name: str, number: int) -> None:
        nonlocal before
        gc.collect()
        now = tracemalloc.get_traced_memory()[0]
        made[name], before = (now - before) / number, now

    pool = BlockManager(num_device_blocks=crowd.num_blocks, num_host_blocks=0, block_size=BLOCK_SIZE)
    added("bytes_per_block", crowd.num_blocks)
    del pool
    gc.collect()
    loop = HostLoop(
        max_num_seqs=crowd.num_running, num_blocks=crowd.num_blocks, max_model_len=max(2048, crowd.context_len + 1024)
    )
    running = [loop.make_request(crowd.context_len) for _ in range(crowd.num_running)]
    before = tracemalloc.get_traced_memory()[0]
    for request in running:
        loop.scheduler.add(request)
    cache = loop.scheduler.block_manager.prefix_cache
    while not loop.is_full:
        loop.step(is_built=False)
    added("bytes_per_running_sequence", crowd.num_running)
    made["cached_blocks_per_running_sequence"] = len(cache) / crowd.num_running
    waiting = [loop.make_request(crowd.context_len) for _ in range(crowd.num_waiting)]
    added("bytes_per_request_object", crowd.num_waiting)
    for request in waiting:
        loop.scheduler.add(request)
    added("bytes_per_waiting_request", crowd.num_waiting)
    before_reset = len(cache)
    loop.scheduler.block_manager.reset_prefix_cache()
    gc.collect()
    made["bytes_per_cached_block"] = (before - tracemalloc.get_traced_memory()[0]) / before_reset
    tracemalloc.stop()
    return made


def main() -> None:
    worker = HostScaleWorker()
    serve(
        {"prepare": worker.prepare, "run": worker.run, "memory": worker.memory, "finish": worker.finish},
        {"python": platform.python_version()},
    )


if __name__ == "__main__":
    main()
