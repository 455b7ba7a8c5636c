"""How long is one decode step, by the number of sequences, and one prefill step, by the number of tokens?

Bound by memory bandwidth for few sequences and by the matmul rate for many. A decode step is the difference between two
runs of `LLM.generate` that differ in output length only, by their steps: prompts come from the prefix cache, so prefill
and host time are in it as they are in serving. A prefill step is a run of one prompt for one token. To compare two
commits, run it in a checkout of each, in turn, several times.

    python -m bench.steps --shape 110M --num-seqs 1 8 16 32 64
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.record import describe_run, note, write_result
from bench.shapes import DTYPES, SHAPES, write_model
from jaxpaged import LLM, SamplingParams

BUDGET = 512
"""Tokens a step at most."""


def run_s(llm: LLM, prompts: Sequence[list[int]], max_tokens: int) -> float:
    """Seconds of one run, greedy, to exactly `max_tokens`."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[1, 8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, BUDGET], help="prompts of so many tokens")
    parser.add_argument("--context-len", type=int, default=250)
    parser.add_argument("--num-steps", type=int, default=16, help="decode steps that are timed at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    options = parser.parse_args(arguments)
    if min([1, *options.num_seqs, *options.prefill, options.num_steps, options.repeats]) < 1:
        parser.error("numbers of sequences, tokens, steps and repeats must be at least 1")

    shape = SHAPES[options.shape]
    rng = np.random.default_rng(0)
    decode_ms: dict[int, list[float]] = {num: [] for num in options.num_seqs}
    prefill_ms: dict[int, list[float]] = {num: [] for num in options.prefill}
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder), dtype=options.dtype)
        llm = LLM(
            folder, dtype=options.dtype, show_progress=False, max_num_batched_tokens=BUDGET,
            max_num_seqs=max([1, *options.num_seqs]),
        )
        prompts = rng.integers(3, shape.vocab_size, (max([1, *options.num_seqs]), options.context_len)).tolist()
        for repeat in range(options.repeats + 1):  # the first compiles, and fills the prefix cache
            for num, times in decode_ms.items():
                short = run_s(llm, prompts[:num], 1)
                took = run_s(llm, prompts[:num], 1 + options.num_steps) - short
                times.append(took / options.num_steps * 1e3)
            for num, times in prefill_ms.items():
                fresh = rng.integers(3, shape.vocab_size, num).tolist()
                times.append(run_s(llm, [fresh], 1) * 1e3)
            note(f"{repeat} of {options.repeats} done")

    result = {**describe_run("bench.steps", arguments), "shape": shape.name, "dtype": options.dtype}
    for name, unit, series in (("decode", "sequences", decode_ms), ("prefill", "tokens", prefill_ms)):
        result[f"{name}_ms"] = {str(num): [round(ms, 2) for ms in times[1:]] for num, times in series.items()}
        for num, times in series.items():
            median, least = statistics.median(times[1:]), min(times[1:])
            print(f"{name:>7} {num:>5} {unit}: {median:8.1f} ms a step (least {least:.1f})")
    write_result(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
