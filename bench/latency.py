"""How long does one batch take, from the call until its last token, and until its first?

The offline engine, on any model folder: `--batch-size` random prompts of one length, greedy, to a forced number of
tokens, with an empty prefix cache each time. Prefill is compute-bound, decode of few sequences bound by bandwidth.
Loading and the first runs, which compile, are told apart. Fields of the result are those of `vllm bench latency`, and
more.

    jaxpaged bench latency --model path/to/model --batch-size 8 --input-len 32 --output-len 128
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.engine_worker import EngineWorker
from bench.model_flags import add_model_flags, load, make_parser
from bench.record import describe_run, write_result

PERCENTILES = (10, 25, 50, 75, 90, 99)
MS = 1e3


def summarize(replies: Sequence[dict[str, Any]], *, batch_size: int, output_len: int) -> dict[str, Any]:
    """Latencies of the timed runs in seconds, and what follows of them."""
    latencies = [reply["elapsed_s"] for reply in replies]
    # the first token of the last row: from then on the whole batch decodes
    first = [max(reply["first_token_s"]) for reply in replies]
    per_token = [
        (total - sooner) / (output_len - 1) for total, sooner in zip(latencies, first, strict=True) if output_len > 1
    ]
    median = float(np.median(latencies))
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(percent): float(np.percentile(latencies, percent)) for percent in PERCENTILES},
        "first_token_ms": {"median": float(np.median(first)) * MS, "p99": float(np.percentile(first, 99)) * MS},
        "decode_step_ms": {"median": float(np.median(per_token)) * MS} if per_token else None,
        "output_tokens_per_s": batch_size * output_len / median,
    }


def print_report(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{result['model']} {result['dtype']} on {result['device']}: batch of {result['batch_size']}, "
          f"{result['input_len']} prompt and {result['output_len']} output tokens, {result['num_iters']} runs")
    print(f"loaded in {result['load_s']:.1f} s; first run, with compiles, {result['first_run_s']:.2f} s; "
          f"compiles behind the warm-up: {result['num_compiles_after_warmup']}")
    rows = [("mean", result["avg_latency"])]
    rows += [(f"p{percent}", result["percentiles"][str(percent)]) for percent in (50, 90, 99)]
    for name, seconds in rows:
        print(f"{name:>6} {seconds * MS:12.2f} ms")
    step = result["decode_step_ms"]
    print(f"first token after {result['first_token_ms']['median']:.2f} ms (median)"
          + (f", then {step['median']:.3f} ms a step" if step else "")
          + f"; {result['output_tokens_per_s']:.1f} output tokens/s")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("latency", __doc__)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of a batch (default: 8)")
    parser.add_argument("--input-len", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an output, forced (default: 128)")
    parser.add_argument("--num-iters-warmup", type=int, default=3, help="runs before those that count (default: 3)")
    parser.add_argument("--num-iters", type=int, default=20, help="runs that count (default: 20)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    for name in ("batch_size", "input_len", "output_len", "num_iters", "num_iters_warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    worker = EngineWorker()
    facts = load(worker, args)
    if args.batch_size > facts["max_num_seqs"]:
        raise ValueError(
            f"a batch of {args.batch_size} would wait for itself: at most {facts['max_num_seqs']} sequences run at "
            f"once; give --max-num-seqs {args.batch_size} too"
        )
    rng = np.random.default_rng(args.seed)
    prompts = rng.integers(3, facts["vocab_size"], (args.batch_size, args.input_len)).tolist()
    max_tokens = [args.output_len] * args.batch_size
    replies = []
    num_runs = args.num_iters_warmup + args.num_iters
    for _ in tqdm(range(num_runs), desc="Batches", unit="batch", disable=args.quiet, leave=False):
        replies.append(worker.generate(prompts, max_tokens))
    timed = replies[args.num_iters_warmup :]
    result = {
        **describe_run("bench.latency", arguments),
        **facts,
        "batch_size": args.batch_size, "input_len": args.input_len, "output_len": args.output_len,
        "num_iters": args.num_iters, "seed": args.seed,
        "first_run_s": replies[0]["elapsed_s"], "compile_s": replies[0]["warm_up_s"],
        **summarize(timed, batch_size=args.batch_size, output_len=args.output_len),
        **worker.finish(),
    }  # fmt: skip
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
