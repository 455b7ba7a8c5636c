"""Normalized latency against request rate on a virtual clock, for each memory policy, and the rates they sustain."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from bench.paper.reservation import Policy, ReservationGate
from bench.paper.step_costs import Costs
from bench.paper.virtual_clock import Arrival, Memory, Method, Outcome, poisson, simulate
from bench.record import note
from bench.workloads import PAPER_MEANS, paper_lens
from jaxpaged.runner.buckets import Buckets

FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Where a policy's curve is drawn, of the requests a second it serves when all come at once: less than it could keep up
for ever, for the last ones have the memory to themselves. A curve ends above the largest latency that is asked about.
"""
NUM_ALONE = 64
"""Requests that are served one by one to know the latency without load."""
PAPER_GAINS = {
    ("ShareGPT-like", "greedy", 1): {"oracle": (1.7, 2.7), "max": (2.7, 8.0)},
    ("Alpaca-like", "greedy", 1): {"oracle": (1.3, 1.3)},
    ("Alpaca-like", "beams", 6): {"oracle": (2.3, 2.3)},
}
"""How many times the rate of a reservation paging sustains, OPT-13B (ShareGPT: larger ones too): lowest, highest."""


@dataclass(frozen=True)
class Case:
    """Which requests."""

    lengths: str
    method: Method
    number: int
    """Samples or beams."""


@dataclass(frozen=True)
class Contender:
    """A memory policy; None is paging."""

    policy: Policy | None
    has_buddies: bool = True

    def gate(self, memory: Memory) -> ReservationGate | None:
        if self.policy is None:
            return None
        return ReservationGate(
            self.policy, num_slots=memory.num_slots, max_model_len=memory.max_model_len, has_buddies=self.has_buddies
        )

    @property
    def name(self) -> str:
        return "paging" if self.policy is None else self.policy + ("" if self.has_buddies else ", ideally packed")


PAGING = Contender(None)
CONTENDERS = (Contender("max"), Contender("pow2"), Contender("oracle"), Contender("oracle", False), PAGING)
FEW_CONTENDERS = (Contender("max"), Contender("oracle"), PAGING)
"""With samples and beams, whose runs take longer."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every simulated run has in common."""

    memory: Memory
    buckets: Buckets
    num_requests: int
    longest: int
    seed: int

    def lens(self, case: Case, num_requests: int | None = None) -> list[tuple[int, int]]:
        if num_requests is None:
            num_requests = self.num_requests if case.method == "greedy" else -(-self.num_requests // 3)
        return paper_lens(np.random.default_rng(self.seed), num_requests, case.lengths, longest=self.longest)

    def run(self, case: Case, contender: Contender, costs: Costs, arrivals: Sequence[Arrival]) -> Outcome:
        return simulate(
            arrivals, costs, self.memory, self.buckets, gate=contender.gate(self.memory), method=case.method,
            number=case.number,
        )  # fmt: skip

    def capacity(self, case: Case, contender: Contender, costs: Costs) -> Outcome:
        """All requests at once."""
        return self.run(case, contender, costs, [Arrival(0.0, *pair) for pair in self.lens(case)])

    def unloaded_s(self, case: Case, costs: Costs) -> float:
        """Mean normalized latency of requests of which each is alone."""
        alone = [self.run(case, PAGING, costs, [Arrival(0.0, *pair)]) for pair in self.lens(case)[:NUM_ALONE]]
        return float(np.mean([outcome.normalized_latencies_s[0] for outcome in alone]))

    def curve(self, case: Case, contender: Contender, costs: Costs, most_s: float) -> dict[str, Any]:
        """The points of a contender up to a normalized latency, and what it did with all requests at once."""
        most = self.capacity(case, contender, costs).summary()
        points = []
        for fraction in FRACTIONS:
            rate = fraction * most["requests_per_s"]
            outcome = self.run(case, contender, costs, poisson(self.lens(case), rate, self.seed))
            points.append({"rate": rate, **outcome.summary()})
            if points[-1]["normalized_latency_s"] > most_s:
                break
        return {"contender": contender.name, "all_at_once": most, "points": points}


def sustained_rate(points: Sequence[dict[str, Any]], limit_s: float) -> float | None:
    """The rate at which the mean normalized latency reaches the limit, between two points; None if none does."""
    for before, after in zip(points, points[1:], strict=False):
        low, high = before["normalized_latency_s"], after["normalized_latency_s"]
        if low <= limit_s < high:
            part = (math.log(limit_s) - math.log(low)) / (math.log(high) - math.log(low))
            return before["rate"] + part * (after["rate"] - before["rate"])
    return None


def cases_of(methods: Sequence[Method], numbers: Sequence[int]) -> Iterator[Case]:
    for method in methods:
        if method == "greedy":
            yield from (Case(lengths, method, 1) for lengths in PAPER_MEANS)
        else:
            yield from (Case("Alpaca-like", method, number) for number in numbers)


def measure_case(bench: Bench, case: Case, clock: str, costs: Costs, factors: Sequence[float]) -> dict[str, Any]:
    """The curves of all contenders, the rates they sustain, and how many times theirs is paging's."""
    unloaded_s = bench.unloaded_s(case, costs)
    contenders = CONTENDERS if case.method == "greedy" else FEW_CONTENDERS
    curves = [bench.curve(case, contender, costs, max(factors) * unloaded_s) for contender in contenders]
    for curve in curves:
        curve["sustained"] = {str(f): sustained_rate(curve["points"], f * unloaded_s) for f in factors}
    paging = curves[-1]
    for curve in curves:
        curve["paging_sustains"] = {
            factor: paging["sustained"][factor] / rate if rate and paging["sustained"][factor] else None
            for factor, rate in curve["sustained"].items()
        }
        curve["paging_serves"] = (
            paging["all_at_once"]["requests_per_s"] / curve["all_at_once"]["requests_per_s"]
        )
    gains = {name: list(pair) for name, pair in PAPER_GAINS.get((case.lengths, case.method, case.number), {}).items()}
    note(f"{case}, {clock} clock: done")
    return {**asdict(case), "clock": clock, "unloaded_s": unloaded_s, "curves": curves, "paper_gains": gains}


def run_all(tasks: Sequence[tuple[Bench, Case, str, Costs, Sequence[float]]], num_processes: int) -> list[Any]:
    """What `measure_case` gives of each, in order; other processes are as good, as the clock is virtual."""
    if num_processes == 1:
        return [measure_case(*task) for task in tasks]
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure_case, *zip(*tasks, strict=True)))
