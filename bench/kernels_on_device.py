"""The bench of attention on an accelerator: its arguments, the result it may go on with, and what it says at the end.

`python -m bench.kernels` on a GPU or TPU, or with `--device` small and interpreted.
"""

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.device_cases import DEVICE_CASES, GROUP_4, SMALL_CASES, checks_for
from bench.device_kernels import COPY_BYTES, MATMUL_SIZE, attention_case, copy_bandwidth, matmul_rate
from bench.device_layers import PEERS
from bench.kernel_agenda import Run, agenda, empty_result, verdicts
from bench.record import add_resume_flags, describe_run, note, resumed, sources_digest, write_result
from pallas_kernels import IMPLEMENTATIONS, pick

SOURCES = ("pallas_kernels/**/*.py", "pallas_kernels/**/*.cc", "pallas_kernels/**/*.json", "bench/*.py")
"""What a result depends on: the kernels, their tuned sizes, and this bench."""


def device_names() -> list[str]:
    """Who is timed on this device if nobody is named: its kernels, plain XLA, and the peers."""
    platform = jax.default_backend()
    kernels = [row.name for row in IMPLEMENTATIONS if platform in row.platforms and row.name != "reference"]
    # without an accelerator the TPU's kernel is interpreted, so that there is one
    return ["mosaic_tpu", "xla", *PEERS] if platform == "cpu" else [*kernels, *PEERS]


def main(arguments: Sequence[str]) -> int:
    """The bench on an accelerator, or small and interpreted on a CPU; the exit status is 1 where a kernel failed."""
    started = time.perf_counter()
    is_small = jax.default_backend() == "cpu"
    cases = SMALL_CASES if is_small else DEVICE_CASES
    names = [*(row.name for row in IMPLEMENTATIONS), *PEERS]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels --device")
    parser.add_argument("--implementations", nargs="+", choices=names, default=device_names())
    parser.add_argument("--cases", nargs="+", metavar="PART", default=[""], help="those that have one in their name")
    parser.add_argument("--num-layers", type=int, default=2 if is_small else 8)
    parser.add_argument("--repeats", type=int, default=1 if is_small else 10)
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after them (%(default)s)")
    add_resume_flags(parser, "kernels")
    parser.add_argument("--device", action="store_true", help="this bench also without an accelerator, small")
    args = parser.parse_args(arguments)
    chosen = tuple(case for case in cases if any(part in case.name for part in args.cases))
    if not chosen or args.num_layers < 1 or args.repeats < 1 or not args.minutes > 0:
        parser.error("--cases must fit some case, --num-layers and --repeats be 1 or more, --minutes above 0")
    kind = jax.devices()[0].device_kind
    identity = {"device": kind, "jax": jax.__version__, "num_layers": args.num_layers}
    identity["sources"] = sources_digest(SOURCES)
    result = resumed(parser, args, identity, empty_result(), None if is_small else "kernels")
    if is_small:
        note("on a CPU, kernels are interpreted: these times say nothing about hardware")
    bandwidth = copy_bandwidth(num_bytes=2**26 if is_small else COPY_BYTES)
    rate = matmul_rate(size=512 if is_small else MATMUL_SIZE)
    print(f"{kind}: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matmul {rate / 1e12:.2f} TFLOP/s")
    run = describe_run("bench.kernels", arguments)
    result["runs"].append({**run, "copy_bytes_per_s": bandwidth, "matmul_flops_per_s": rate})
    result = {**run, **identity, "is_interpreted": is_small, **result}
    picked = picked_name(args.implementations)
    jobs = agenda(args.implementations, chosen, checks_for(chosen, is_small), picked)
    Run(result, args.output, args.num_layers, args.repeats, bandwidth, rate).do_all(
        jobs, until=started + 60 * args.minutes
    )
    result["picked"], result["goals"] = picked, verdicts(result, jobs, picked)
    tell_goals(result)
    write_result(result, args.output)
    return 1 if result["failed"] else 0


def picked_name(names: Sequence[str]) -> str:
    """The kernel whose goals are looked at: the one that is picked for the heads of Llama, or the first of `names`."""
    kernels = [name for name in names if name not in PEERS]
    picked = pick(attention_case(GROUP_4, 16)).name
    return picked if picked in kernels or not kernels else kernels[0]


def tell_goals(result: Mapping[str, Any]) -> None:
    """The last lines for people: each goal, what failed, and how many are reached, missed or not measured."""
    for goal in result["goals"]:
        found = "" if goal["found"] is None else f" ({goal['found']:.3g})"
        print(f"{goal['goal']:<76}{goal['verdict']}{found}")
    for row in result["failed"]:
        print(f"FAILED: {row['kind']} {row['implementation']} on {row['case']}: {row['because']}")
    counts = Counter(goal["verdict"] for goal in result["goals"])
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("reached", "missed", "not measured"))
    rest = f"; {len(result['left_out'])} jobs are left for --resume" if result["left_out"] else ""
    print(f"goals of {result['picked']} on {result['device']}: {told}; {len(result['failed'])} failed{rest}")
