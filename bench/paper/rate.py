"""Which request rate does each memory policy sustain at equal latency? (Kwon et al. 2023, figures 12 and 14)

Normalized latency (seconds from arrival to the last token, a token of output; the mean over requests) against the rate
of Poisson arrivals, in equal KV memory: paging against contiguous reservations (`reservation.py`). Lengths are
log-normal with ShareGPT's and Alpaca's means; requests of Alpaca's lengths also with 2, 4 and 6 samples and beams.
15,700 slots for tokens and 2,048 positions are what the paper's 13B model had on its GPU.

The clock is virtual (`virtual_clock.py`): the real scheduler plans every step, no model runs, and a step takes what a
cost model says. Two clocks: *fitted*, to steps of the live engine on this machine, measured first; and *roofline*, the
least time that peak rates of the paper's device allow its model, which is calculated and no measurement. Some points
of the fitted clock are served live as well, and the difference is told. Bound by arithmetic on two cores, where a step
of many sequences takes nearly as many times longer; by the memory's bandwidth on the paper's device.

    python -m bench.paper.rate --output bench/results/rate.json
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.command import describe, make_parser, parse_sized
from bench.paper.live import measure_steps, serve, warm_up
from bench.paper.reservation import Policy, ReservationGate
from bench.paper.step_costs import PAPER_DEVICE, Costs, LinearCosts, as_json, fit, relative_errors
from bench.paper.virtual_clock import Arrival, Memory, Method, Outcome, poisson, simulate
from bench.record import note, write_result
from bench.shapes import SHAPES, write_model
from bench.workloads import PAPER_MEANS, paper_lens
from jaxpaged import LLM
from jaxpaged.runner.buckets import Buckets

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15)
"""Of the requests a second that a policy serves when all come at once: where its curve is drawn."""
NUM_ALONE = 64
"""Requests that are served one by one to know the latency without load."""
LIVE_FRACTION = 0.7
PAPER_GAINS = {
    ("ShareGPT-like", "greedy", 1): {"oracle": (1.7, 2.7), "max": (2.7, 8.0)},
    ("Alpaca-like", "greedy", 1): {"oracle": (1.3, 1.3)},
    ("Alpaca-like", "beams", 6): {"oracle": (2.3, 2.3)},
}
"""How many times the rate of a reservation paging sustains, OPT-13B (ShareGPT: larger ones too): lowest, highest."""
SMALL = {
    "shape": "tiny", "num_requests": 30, "num_slots": 1024, "max_model_len": 256, "max_num_seqs": 8,
    "max_num_batched_tokens": 32, "bursts": [1, 4, 8], "num_measured_tokens": 6, "num_live_requests": 6,
    "numbers": [2], "longest": 60,
}  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every simulated run has in common."""

    memory: Memory
    buckets: Buckets
    num_requests: int
    longest: int
    seed: int

    def lens(self, case: Case, num_requests: int | None = None) -> list[tuple[int, int]]:
        rng = np.random.default_rng(self.seed)
        return paper_lens(rng, num_requests or self.num_requests, case.lengths, longest=self.longest)

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

    def curve(self, case: Case, contender: Contender, costs: Costs) -> dict[str, Any]:
        """The points of a contender, and what it did with all requests at once."""
        most = self.capacity(case, contender, costs).summary()
        points = []
        for fraction in FRACTIONS:
            rate = fraction * most["requests_per_s"]
            outcome = self.run(case, contender, costs, poisson(self.lens(case), rate, self.seed))
            points.append({"rate": rate, **outcome.summary()})
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
    curves = [bench.curve(case, contender, costs) for contender in CONTENDERS]
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
    return {**asdict(case), "clock": clock, "unloaded_s": unloaded_s, "curves": curves, "paper_gains": gains}


def measured_costs(llm: LLM, args: Any) -> tuple[dict[Method, LinearCosts], dict[str, Any]]:
    """Costs of a step of each method, and what they are made of and how well they fit."""
    warm_up(
        llm, with_sampler="sampling" in args.methods,
        num_candidates=[2 * number for number in args.numbers] if "beams" in args.methods else (),
    )  # fmt: skip
    costs: dict[Method, LinearCosts] = {}
    told = {}
    for method in args.methods:
        numbers = [1] if method == "greedy" else args.numbers
        bursts = [num for num in args.bursts if num * max(numbers) <= 2 * args.max_num_seqs]
        times = measure_steps(
            llm, method, numbers, bursts=bursts, prompt_means=args.prompt_means,
            num_output_tokens=args.num_measured_tokens, seed=args.seed,
        )  # fmt: skip
        costs[method] = fit(times.works, times.seconds)
        errors = relative_errors(costs[method], times.works, times.seconds)
        told[method] = {**as_json(costs[method]), **errors, "num_steps": len(times.works)}
        note(f"{method}: {len(times.works)} steps, median error {100 * errors['median_step_error']:.0f} %")
    return costs, told


def validate(llm: LLM, bench: Bench, costs: dict[Method, LinearCosts], args: Any) -> list[dict[str, Any]]:
    """The same arrivals live and on the fitted clock."""
    middle = args.numbers[len(args.numbers) // 2]
    points = [
        (Case("ShareGPT-like", "greedy", 1), PAGING), (Case("ShareGPT-like", "greedy", 1), Contender("max")),
        (Case("Alpaca-like", "sampling", middle), PAGING), (Case("Alpaca-like", "beams", middle), PAGING),
    ]  # fmt: skip
    rows = []
    for case, contender in points:
        if case.method not in costs:
            continue
        rate = LIVE_FRACTION * bench.capacity(case, contender, costs[case.method]).summary()["requests_per_s"]
        arrivals = poisson(bench.lens(case, args.num_live_requests), rate, bench.seed)
        told = bench.run(case, contender, costs[case.method], arrivals).summary()
        live = serve(
            llm, arrivals, method=case.method, number=case.number, gate=contender.gate(bench.memory), seed=bench.seed
        )
        error = told["normalized_latency_s"] / live["normalized_latency_s"] - 1
        note(f"{case}, {contender.name}: live {1e3 * live['normalized_latency_s']:.1f} ms a token, error {error:+.0%}")
        rows.append({**asdict(case), "contender": contender.name, "rate": rate, "live": live, "virtual": told,
                     "latency_error": error})  # fmt: skip
    return rows


def measure(args: Any) -> dict[str, Any]:
    """Everything: costs, validation, and each case on each clock."""
    shape = replace(SHAPES[args.shape], max_position_embeddings=args.max_model_len)
    memory = Memory(
        num_slots=args.num_slots, block_size=args.block_size, max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-rate-") as scratch:
        folder = write_model(shape, Path(scratch) / "model", seed=args.seed)
        llm = LLM(
            str(folder), max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len, block_size=args.block_size,
            max_num_batched_tokens=args.max_num_batched_tokens, enable_prefix_caching=False, preemption="recompute",
            num_device_blocks=1 + args.num_slots // args.block_size, show_progress=False,
        )  # fmt: skip
        bench = Bench(
            memory=memory, buckets=llm.engine.runner.shapes.buckets, num_requests=args.num_requests,
            longest=args.longest, seed=args.seed,
        )  # fmt: skip
        costs, told = measured_costs(llm, args)
        validation = validate(llm, bench, costs, args)
    rows = []
    for case in cases_of(args.methods, args.numbers):
        for clock in args.clocks:
            clock_costs: Costs = costs[case.method] if clock == "fitted" else PAPER_DEVICE
            rows.append(measure_case(bench, case, clock, clock_costs, args.factors))
            note(f"{case}, {clock} clock: done")
    return {
        "shape": args.shape, "num_slots": args.num_slots, "num_requests": args.num_requests,
        "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs, "factors": args.factors,
        "step_costs": told, "roofline": {"device": PAPER_DEVICE.device.name, "model": PAPER_DEVICE.model.name},
        "validation": validation, "rows": rows,
    }  # fmt: skip


def print_report(result: dict[str, Any]) -> None:
    """The tables for people."""
    for row in result["validation"]:
        print(f"check of the fitted clock: {row['lengths']}, {row['method']} {row['number']}, {row['contender']}, "
              f"{row['rate']:.2f} requests/s: live {1e3 * row['live']['normalized_latency_s']:.2f} ms a token, virtual "
              f"{1e3 * row['virtual']['normalized_latency_s']:.2f} ({100 * row['latency_error']:+.0f} %)")
    for row in result["rows"]:
        print(f"\n{row['lengths']}, {row['method']} {row['number']}, {row['clock']} clock, alone "
              f"{1e3 * row['unloaded_s']:.2f} ms a token; requests/s at so many times that, and paging's multiple:")
        print(f"  {'memory policy':<24}" + "".join(f"{f'{float(f):g}x':>9}{'':>9}" for f in result["factors"])
              + f"{'at once':>9}{'running':>9}{'paper':>11}")
        for curve in row["curves"]:
            cells = ""
            for factor, rate in curve["sustained"].items():
                gain = curve["paging_sustains"][factor]
                cells += f"{'-' if rate is None else f'{rate:.3g}':>9}{'' if gain is None else f'{gain:.2f}x':>9}"
            paper = row["paper_gains"].get(curve["contender"])
            shown = "" if paper is None else "-".join(f"{value:g}x" for value in dict.fromkeys(paper))
            most = curve["all_at_once"]
            print(f"  {curve['contender']:<24}{cells}{curve['paging_serves']:8.2f}x{most['mean_running']:9.1f}"
                  f"{shown:>11}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("bench.paper.rate", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="15M", help="model whose steps are measured")
    parser.add_argument("--methods", nargs="+", choices=["greedy", "sampling", "beams"],
                        default=["greedy", "sampling", "beams"])  # fmt: skip
    parser.add_argument("--numbers", type=int, nargs="+", default=[2, 4, 6], help="samples, or beams, of a request")
    parser.add_argument("--clocks", nargs="+", choices=["fitted", "roofline"], default=["fitted", "roofline"])
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0, 5.0, 10.0],
                        help="latencies at which rates are compared, as multiples of the latency without load")
    parser.add_argument("--num-requests", type=int, default=600)
    parser.add_argument("--num-slots", type=int, default=15_700, help="tokens whose keys and values fit in memory")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=1024, help="clip of prompt and output lengths")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--bursts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256],
                        help="requests at once while steps are measured")
    parser.add_argument("--prompt-means", type=int, nargs="+", default=[19, 161], help="of those requests")
    parser.add_argument("--num-measured-tokens", type=int, default=24, help="output of each of those requests")
    parser.add_argument("--num-live-requests", type=int, default=100, help="served live to check the fitted clock")
    args = parse_sized(parser, arguments, SMALL)
    if min(args.num_requests, args.num_live_requests, *args.numbers, *args.bursts) < 1 or min(args.factors) <= 1:
        parser.error("numbers must be 1 or more, and --factors above 1")
    if args.num_slots < args.max_model_len or 2 * args.longest > args.max_model_len:
        parser.error("--num-slots must hold --max-model-len, and that --longest twice")
    result = describe("bench.paper.rate", arguments, args) | measure(args)
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
