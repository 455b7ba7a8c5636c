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

In two parts, of which only the first needs a quiet machine: `--clocks --output costs.json`, then `--costs costs.json`.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from bench.ceilings import num_cores
from bench.paper.command import describe, make_parser, parse_sized
from bench.paper.curves import PAGING, Bench, Case, Contender, cases_of, run_all
from bench.paper.live import measure_steps, serve, warm_up
from bench.paper.step_costs import PAPER_DEVICE, LinearCosts, as_json, fit, from_json, relative_errors
from bench.paper.virtual_clock import Memory, Method, poisson
from bench.record import note, write_result
from bench.shapes import SHAPES, write_model
from jaxpaged import LLM
from jaxpaged.runner.buckets import Bucket, Buckets

LIVE_FRACTION = 0.6
"""Of the requests a second that are served when all come at once, for the points that are served live."""
SMALL = {
    "shape": "tiny", "num_requests": 30, "num_slots": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 64,
    "bursts": [1, 4, 8], "num_measured_tokens": 6, "num_live_requests": 6, "numbers": [2], "num_processes": 1,
}  # fmt: skip


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


def measure_costs(args: Any) -> dict[str, Any]:
    """Step costs of this machine and how well the clock made of them agrees with the live engine."""
    shape = replace(SHAPES[args.shape], max_position_embeddings=args.max_model_len)
    with tempfile.TemporaryDirectory(prefix="bench-rate-") as scratch:
        folder = write_model(shape, Path(scratch) / "model", seed=args.seed)
        llm = LLM(
            str(folder), max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len, block_size=args.block_size,
            max_num_batched_tokens=args.max_num_batched_tokens, enable_prefix_caching=False, preemption="recompute",
            num_device_blocks=1 + args.num_slots // args.block_size, show_progress=False,
        )  # fmt: skip
        buckets = llm.engine.runner.shapes.buckets
        costs, told = measured_costs(llm, args)
        return {
            "shape": args.shape, "step_costs": told, "buckets": [astuple(bucket) for bucket in buckets.all],
            "validation": validate(llm, make_bench(args, buckets), costs, args),
        }  # fmt: skip


def earlier_costs(args: Any) -> dict[str, Any]:
    """The same from an earlier result; ValueError where it was made for other steps."""
    result = json.loads(args.costs.read_text())
    missing = [method for method in args.methods if method not in result["step_costs"]]
    if missing or result["buckets"][-1][0] != args.max_num_batched_tokens:
        raise ValueError(
            f"{args.costs.name} has no costs of {', '.join(missing) or f'{args.max_num_batched_tokens} tokens a step'}:"
            " measure them, without --costs"
        )
    taken = {name: result[name] for name in ("shape", "step_costs", "buckets", "validation")}
    origin = ("date", "commit", "command", "host", "device", "versions")
    return taken | {"costs_from": result.get("costs_from") or {name: result[name] for name in origin}}


def make_bench(args: Any, buckets: Buckets) -> Bench:
    return Bench(
        memory=Memory(
            num_slots=args.num_slots, block_size=args.block_size, max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
        ),
        buckets=buckets, num_requests=args.num_requests, longest=args.longest, seed=args.seed,
    )  # fmt: skip


def measure(args: Any) -> dict[str, Any]:
    """Everything: costs, validation, and each case on each clock."""
    measured = earlier_costs(args) if args.costs is not None else measure_costs(args)
    bench = make_bench(args, Buckets(tuple(Bucket(*sizes) for sizes in measured["buckets"])))
    tasks = [
        (
            bench, case, clock,
            from_json(measured["step_costs"][case.method]) if clock == "fitted" else PAPER_DEVICE, args.factors,
        )
        for case in cases_of(args.methods, args.numbers)
        for clock in args.clocks
    ]  # fmt: skip
    return {
        **measured, "num_slots": args.num_slots, "num_requests": args.num_requests, "factors": args.factors,
        "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs,
        "roofline": {"device": PAPER_DEVICE.device.name, "model": PAPER_DEVICE.model.name},
        "rows": run_all(tasks, args.num_processes) if tasks else [],
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
    parser.add_argument("--clocks", nargs="*", choices=["fitted", "roofline"], default=["fitted", "roofline"],
                        help="none: only measure what steps cost")
    parser.add_argument("--costs", type=Path, help="take what steps cost from this earlier result of the bench")
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0, 5.0, 10.0],
                        help="latencies at which rates are compared, as multiples of the latency without load")
    parser.add_argument("--num-requests", type=int, default=1000, help="with samples and beams a third of it")
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
    parser.add_argument("--num-processes", type=int, default=num_cores(), help="that run the virtual clock")
    args = parse_sized(parser, arguments, SMALL)
    numbers = (args.num_requests, args.num_live_requests, args.num_processes, *args.numbers, *args.bursts)
    if min(numbers) < 1 or min(args.factors) <= 1:
        parser.error("numbers must be 1 or more, and --factors above 1")
    if args.num_slots < args.max_model_len or 2 * args.longest > args.max_model_len:
        parser.error("--num-slots must hold --max-model-len, and that --longest twice")
    result = describe("bench.paper.rate", arguments, args) | measure(args)
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
