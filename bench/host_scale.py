"""Does the host's time a step stay what it is when the pool, the queue of waiting requests and the context grow?

Bound by one core's plain Python. The real `core/` and the input batch, without a device, one step ahead as in the
engine: every sequence decodes a token a step, one request in a hundred ends and one that waited begins in its place,
and as many new ones queue up. Every pool was used once before, so that its free blocks are all in the prefix cache. The bars:
linear in the sequences that run, no growth with the pool, none with those who wait. Memory is what Python allocated.

    python -m bench.host_scale --output bench/results/host-scale.json
"""

import argparse
import math
import random
import statistics
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.host_loop import BLOCK_SIZE, CollectorClock, HostLoop, StepTimes
from bench.record import describe_run, note, save_result, write_result
from jaxpaged.core.group_queue import by_priority, first_come_first_served

AGING_PROMPT_LEN = 2000
"""Tokens of the prompts that use every block of a pool once."""
CONTEXT_LEN = 250


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """A steady state of the host."""

    num_running: int
    num_blocks: int
    num_waiting: int
    context_len: int = CONTEXT_LEN
    has_priorities: bool = False
    """Newcomers have one of ten priorities, so that they enter the queue anywhere; else first come, first served."""

    @property
    def turnover(self) -> int:
        """Requests that end, begin and arrive in a step."""
        return max(1, self.num_running // 100)

    @property
    def max_model_len(self) -> int:
        return max(2048, self.context_len + 1024)


class Steady:
    """A loop brought to a crowd's steady state."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self._random = random.Random(0)
        self.loop = HostLoop(
            max_num_seqs=crowd.num_running, num_blocks=crowd.num_blocks, max_model_len=crowd.max_model_len,
            order=by_priority if crowd.has_priorities else first_come_first_served,
        )  # fmt: skip
        self._use_every_block()
        for _ in range(crowd.num_running):
            self.loop.scheduler.add(self.loop.make_request(crowd.context_len))
        while not self._is_full():
            self.loop.step(is_built=False)
        for _ in range(crowd.num_waiting):
            self.loop.scheduler.add(self._newcomer())
        for _ in range(5):
            self.step()

    def _use_every_block(self) -> None:
        loop, cache = self.loop, self.loop.scheduler.block_manager.prefix_cache
        per_prompt = AGING_PROMPT_LEN // BLOCK_SIZE
        for _ in range(-(-self.crowd.num_blocks // per_prompt)):
            loop.scheduler.add(loop.make_request(AGING_PROMPT_LEN, max_tokens=1))
        while loop.scheduler.has_unfinished:
            loop.step(is_built=False)
        if len(cache) < 0.9 * self.crowd.num_blocks * (per_prompt * BLOCK_SIZE / AGING_PROMPT_LEN) - self.crowd.num_running:
            raise RuntimeError(f"only {len(cache)} of {self.crowd.num_blocks} blocks are in the prefix cache")

    def _is_full(self) -> bool:
        plan = self.loop.last_plan
        return (
            plan is not None
            and len(plan.scheduled) == self.crowd.num_running
            and all(item.num_new_tokens == 1 for item in plan.scheduled)
        )

    def _newcomer(self) -> Any:
        priority = self._random.randrange(10) if self.crowd.has_priorities else 0
        return self.loop.make_request(self.crowd.context_len, priority=priority)

    def step(self) -> StepTimes:
        """A step with its turnover."""
        newcomers = [self._newcomer() for _ in range(self.crowd.turnover)]
        return self.loop.step(newcomers, num_to_end=self.crowd.turnover)


def measure(crowd: Crowd, num_steps: int) -> dict[str, Any]:
    """Milliseconds of a step and its parts, medians; the mean and the longest tell what the garbage collector adds."""
    steady = Steady(crowd)
    with CollectorClock() as collector:
        times = [steady.step() for _ in range(num_steps)]
    counts = steady.loop.scheduler.counts()
    if (counts.running, counts.waiting) != (crowd.num_running, crowd.num_waiting):
        raise RuntimeError(f"{counts} is not the state to measure: {crowd}")
    totals = [1e3 * sum(step) for step in times]
    medians = {f"{name}_ms": 1e3 * statistics.median(column) for name, column in zip(StepTimes._fields, zip(*times))}
    return {
        **asdict(crowd), **medians,
        "host_ms": statistics.median(totals), "host_ms_mean": statistics.mean(totals), "host_ms_max": max(totals),
        "collector_ms": 1e3 * collector.elapsed_s / num_steps,
        "host_us_per_seq": 1e3 * statistics.median(totals) / crowd.num_running,
    }  # fmt: skip
