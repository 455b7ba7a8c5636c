"""How many tokens a second does the offline engine give of a model of yours, when all requests lie ready?

Any model folder, without a peer: lengths like a data set's, all alike, or of a file of prompts; greedy, outputs of
forced lengths, and an empty prefix cache each time. Compute-bound for many requests, bound by bandwidth for few.
Loading and the first run, which compiles, are told apart. Beside transformers, on fixed shapes: `jaxpaged bench
offline`. Fields of the result are those of `vllm bench throughput`, and more.

    jaxpaged bench throughput --model path/to/model --num-prompts 64
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.client.prompts import load_tokenizer
from bench.engine_worker import EngineWorker
from bench.model_flags import add_model_flags, load, make_parser
from bench.plans import DEFAULT_NUM, add_length_flags, check_length_flags, cut_to_fit, draw_plans
from bench.record import describe_run, note, write_result
from bench.report import spread
from bench.request_files import choose, read_dataset
from jaxpaged.llm import resolve_folder


def make_requests(args: argparse.Namespace, facts: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    """Prompts and numbers of output tokens."""
    rng = np.random.default_rng(args.seed)
    num, room = args.num_prompts or DEFAULT_NUM, facts["max_model_len"]
    if args.dataset is None:
        drawn = draw_plans(
            args.lengths, num, input_len=args.input_len, output_len=args.output_len, max_model_len=room, rng=rng
        )
        plans, _, _ = cut_to_fit(drawn, room)
        prompts = [rng.integers(3, facts["vocab_size"], plan.input_len).tolist() for plan in plans]
    else:
        tokenizer = load_tokenizer(str(resolve_folder(args.tokenizer or args.model)))
        found = read_dataset(args.dataset, lambda text: len(tokenizer.encode(text).ids), output_len=args.output_len)
        plans = choose(found, num, room, rng)
        prompts = [tokenizer.encode(plan.text or "").ids for plan in plans]
    return prompts, [plan.output_len for plan in plans]


def summarize(replies: Sequence[dict[str, Any]], num_input: int, num_output: int, num_requests: int) -> dict[str, Any]:
    """Rates of the median run, and how the runs spread."""
    seconds = [reply["elapsed_s"] for reply in replies]
    median_s = statistics.median(seconds)
    steps = [reply["host"] for reply in replies]
    return {
        "elapsed_time": median_s,
        "num_requests": num_requests,
        "num_input_tokens": num_input,
        "num_output_tokens": num_output,
        "total_num_tokens": num_input + num_output,
        "requests_per_second": num_requests / median_s,
        "tokens_per_second": (num_input + num_output) / median_s,
        "output_tokens_per_s": spread([num_output / one for one in seconds]),
        "num_steps": statistics.median(step["num_steps"] for step in steps),
        "host_ms_per_step": statistics.median(1e3 * step["host_s"] / max(step["num_steps"], 1) for step in steps),
    }


def print_report(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{result['model']} {result['dtype']} on {result['device']}: {result['num_requests']} requests, "
          f"{result['num_input_tokens']:,} prompt and {result['num_output_tokens']:,} output tokens")
    print(f"loaded in {result['load_s']:.1f} s; first run, with compiles, {result['first_run_s']:.1f} s; "
          f"compiles behind the warm-up: {result['num_compiles_after_warmup']}")
    rates = result["output_tokens_per_s"]
    print(f"{rates['median']:.1f} output tokens/s (median of {rates['num_runs']}, {rates['min']:.1f} to "
          f"{rates['max']:.1f}); {result['tokens_per_second']:.1f} tokens/s with the prompts, "
          f"{result['requests_per_second']:.2f} requests/s")
    print(f"host time a step: {result['host_ms_per_step']:.3f} ms over {result['num_steps']:.0f} steps; "
          f"{result['num_preemptions']} preemptions; peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("throughput", __doc__)
    add_length_flags(parser)
    parser.add_argument("--repeats", type=int, default=3, help="runs that count (default: 3)")
    add_model_flags(parser, with_seed=False)
    args = parser.parse_args(argv)
    check_length_flags(parser, args)
    if args.repeats < 1:
        parser.error("--repeats must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    worker = EngineWorker()
    facts = load(worker, args)
    prompts, max_tokens = make_requests(args, facts)
    num_output = sum(max_tokens)
    replies: list[dict[str, Any]] = []
    with tqdm(total=args.repeats + 1, desc="Runs", unit="run", disable=args.quiet, leave=False) as bar:
        for _ in range(args.repeats + 1):  # the first compiles
            replies.append(worker.generate(prompts, max_tokens))
            bar.update()
    for reply in replies:
        num_made = sum(map(len, reply["token_ids"]))
        if num_made != num_output:
            raise ValueError(f"{num_made} tokens came instead of {num_output}: a request ended in an error, see above")
    result = {
        **describe_run("bench.throughput", arguments),
        **facts,
        "workload": args.lengths if args.dataset is None else args.dataset.name,
        "seed": args.seed,
        "first_run_s": replies[0]["elapsed_s"], "compile_s": replies[0]["warm_up_s"],
        **summarize(replies[1:], sum(map(len, prompts)), num_output, len(prompts)),
        **worker.finish(),
    }  # fmt: skip
    if result["num_preemptions"]:
        note("the KV cache was too small for all at once: some requests were preempted")
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
