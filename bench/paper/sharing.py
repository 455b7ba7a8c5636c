"""How many KV blocks does sharing save in parallel sampling and in beam search? (Kwon et al. 2023, figure 15)

The share of blocks saved is the engine's own counter: 1 - blocks held / blocks that tables name, averaged over the
steps. Prefix caching is off, so that only the samples or beams of one request share. Lengths are log-normal with the
means of ShareGPT (161 and 338 tokens) and Alpaca (19 and 58), clipped to fit 1,024 positions; outputs end by length.
The trained demo model continues texts of its own; a random-weight model continues random tokens. The paper served
OPT-13B, with real texts. A count, not a time: it does not depend on the machine.

    python -m bench.paper.sharing --output bench/results/sharing.json
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.command import describe, make_parser, parse_sized
from bench.record import note, write_result
from bench.shapes import SHAPES, write_model
from bench.workloads import lognormal_lens
from jaxpaged import LLM, BeamSearchParams, SamplingParams

MAX_MODEL_LEN = 1024
LONGEST_PROMPT = 336
SMALL = {"numbers": [2], "lengths": ["Alpaca-like"], "num_requests": 2, "num_requests_at_once": 2}
METHODS = ("parallel sampling", "beam search")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What the paper's requests look like, and the percentages it reports for 2 to 6 samples or beams."""

    prompt_mean: int
    output_mean: int
    paper: dict[str, tuple[float, float]]


LENGTHS = {
    "ShareGPT-like": Lengths(
        prompt_mean=161, output_mean=338, paper={"parallel sampling": (16.2, 30.5), "beam search": (44.3, 66.3)}
    ),
    "Alpaca-like": Lengths(
        prompt_mean=19, output_mean=58, paper={"parallel sampling": (6.1, 9.8), "beam search": (37.6, 55.2)}
    ),
}


def load(model: str, args: argparse.Namespace, *, num_sequences: int) -> LLM:
    """The engine with room for `num_sequences` at once, and blocks for all of them where nothing is shared."""
    num_blocks = 1 + num_sequences * (MAX_MODEL_LEN // args.block_size)
    return LLM(
        model, max_num_seqs=num_sequences, max_model_len=MAX_MODEL_LEN, block_size=args.block_size,
        num_device_blocks=num_blocks, enable_prefix_caching=False, show_progress=False, seed=args.seed,
    )  # fmt: skip


def make_prompts(llm: LLM, lens: Sequence[int], *, is_trained: bool, seed: int) -> list[list[int]]:
    """Texts that the model itself likes, or random tokens."""
    if not is_trained:
        rng = np.random.default_rng(seed)
        return [rng.integers(3, llm.engine.model_config.vocab_size, length).tolist() for length in lens]
    params = [
        SamplingParams(temperature=1.0, seed=seed + index, max_tokens=length, ignore_eos=True, detokenize=False)
        for index, length in enumerate(lens)
    ]
    begin = {"prompt_token_ids": [llm.get_tokenizer().bos_token_id]}
    outputs = llm.generate([begin] * len(lens), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def params_of(method: str, number: int, max_tokens: int, seed: int) -> SamplingParams | BeamSearchParams:
    """Of one request that ends by length."""
    if method == "beam search":
        return BeamSearchParams(beam_width=number, max_tokens=max_tokens, ignore_eos=True)
    return SamplingParams(n=number, temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def percent_saved(model: str, lengths: Lengths, method: str, number: int, args: argparse.Namespace) -> float:
    """Percentage of blocks saved while `args.num_requests` requests with `number` sequences each are served."""
    rng = np.random.default_rng(args.seed)
    prompt_lens = lognormal_lens(
        rng, args.num_requests, lengths.prompt_mean, sigma=args.sigma, longest=LONGEST_PROMPT
    )
    output_lens = lognormal_lens(
        rng, args.num_requests, lengths.output_mean, sigma=args.sigma, longest=MAX_MODEL_LEN - LONGEST_PROMPT
    )
    llm = load(model, args, num_sequences=args.num_requests_at_once * number)
    prompts = make_prompts(llm, prompt_lens, is_trained=model == "demo", seed=args.seed)
    # a second engine: the counter is a mean over all steps since the start
    llm = load(model, args, num_sequences=args.num_requests_at_once * number)
    params = [params_of(method, number, length, args.seed + index) for index, length in enumerate(output_lens)]
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    stats = llm.stats()
    if stats.num_preemptions:
        raise RuntimeError(f"{stats.num_preemptions} preemptions: the pool was to hold every sequence")
    return 100 * stats.blocks_saved_fraction


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, lengths, method and number of sequences."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-sharing-") as scratch:
        models = {"demo": "demo"}
        if args.random_shape is not None:
            models[f"random {args.random_shape}"] = str(write_model(SHAPES[args.random_shape], Path(scratch) / "model"))
        for name, model in models.items():
            for lengths_name in args.lengths:
                for method in METHODS:
                    for number in args.numbers:
                        saved = percent_saved(model, LENGTHS[lengths_name], method, number, args)
                        note(f"{name}, {lengths_name}, {method}, {number}: {saved:.1f} %")
                        rows.append(
                            {"model": name, "lengths": lengths_name, "method": method, "number": number, "saved": saved}
                        )
    return rows


def print_report(rows: Sequence[dict[str, Any]], numbers: Sequence[int]) -> None:
    """The table for people: percentages saved by number of samples or beams, beside the paper's range."""
    print("KV blocks saved by sharing, %")
    head = "".join(f"{number:>8}" for number in numbers)
    print(f"  {'model':<14}{'lengths':<16}{'method':<20}{head}{'paper (2 to 6)':>18}")
    saved = {(row["model"], row["lengths"], row["method"], row["number"]): row["saved"] for row in rows}
    for model, lengths, method in dict.fromkeys(key[:3] for key in saved):
        cells = "".join(f"{saved[model, lengths, method, number]:8.1f}" for number in numbers)
        low, high = LENGTHS[lengths].paper[method]
        print(f"  {model:<14}{lengths:<16}{method:<20}{cells}{f'{low} to {high}':>18}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("bench.paper.sharing", __doc__)
    parser.add_argument("--numbers", type=int, nargs="+", default=[2, 4, 6], help="samples, or beams, of a request")
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--num-requests-at-once", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--sigma", type=float, default=1.0, help="deviation of the lengths' logarithms")
    parser.add_argument("--random-shape", choices=sorted(SHAPES), help="also a model with random weights")
    args = parse_sized(parser, argv, SMALL)
    if min(args.num_requests, args.num_requests_at_once, *args.numbers) < 1:
        parser.error("numbers must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    rows = measure(args)
    print_report(rows, args.numbers)
    result = describe("bench.paper.sharing", arguments, args)
    result |= {
        "block_size": args.block_size, "num_requests": args.num_requests, "sigma": args.sigma, "rows": rows,
        "paper": {name: lengths.paper for name, lengths in LENGTHS.items()},
    }  # fmt: skip
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
