"""What is a shared prefix worth? Translation with examples, chat over several rounds, questions about one long text.

(Kwon et al. 2023, figures 16 and 17.) The same requests with and without prefix caching, in turn; output tokens a
second. Regime: the matmul rate, which prefill spends on the prefix again and again. Ceiling: the tokens that need no
computing, told as the share of prompt tokens found in the cache. The cache is emptied before each run, so that the
first request of each prefix pays for it. Random weights, lengths log-normal, outputs end by length:

- one-shot and five-shot: an instruction with 1 or 5 examples (80 and 341 tokens, as the paper's), then a sentence of 30
  tokens to translate into 30;
- chat: conversations of 6 rounds at once, each round the whole history and a message of 40 tokens, answered in 100;
- retrieval: 8 questions of 30 tokens about each of some texts of 800 tokens, answered in 50.

    python -m bench.paper.prefix --shape 110M --output bench/results/prefix.json
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.command import describe, make_parser, parse_sized
from bench.record import note, write_result
from bench.report import spread
from bench.shapes import DTYPES, SHAPES, write_model
from bench.workloads import lognormal_lens
from jaxpaged import LLM, SamplingParams

PAPER_GAINS = {"one-shot": 1.67, "five-shot": 3.58, "chat": 2.0}
"""Of the paper's system over one without sharing (figures 16 and 17)."""
SMALL = {"shape": "tiny", "num_requests": 4, "repeats": 1}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt and how many tokens answer it."""

    prompt: list[int]
    num_new_tokens: int


Answers = list[list[int]]
Rounds = Iterator[list[Turn]]


class Maker:
    """Draws tokens and lengths; a case made twice with one seed is the same."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def tokens(self, num: int) -> list[int]:
        return self._rng.integers(3, self._vocab_size, num).tolist()

    def lens(self, num: int, mean: float, longest: int) -> list[int]:
        return lognormal_lens(self._rng, num, mean, sigma=0.5, longest=longest)

    def translation(self, num_requests: int, prefix_len: int) -> list[Turn]:
        """One prefix before every sentence."""
        prefix = self.tokens(prefix_len)
        pairs = zip(self.lens(num_requests, 30, 120), self.lens(num_requests, 30, 120), strict=True)
        return [
            Turn(prompt=prefix + self.tokens(sentence), num_new_tokens=translated) for sentence, translated in pairs
        ]

    def retrieval(self, num_requests: int) -> list[Turn]:
        """Eight questions about each text, one after the other."""
        turns: list[Turn] = []
        lens = zip(self.lens(num_requests, 30, 100), self.lens(num_requests, 50, 120), strict=True)
        text: list[int] = []
        for index, (question, answer) in enumerate(lens):
            if index % 8 == 0:
                text = self.tokens(800)
            turns.append(Turn(prompt=text + self.tokens(question), num_new_tokens=answer))
        return turns

    def chat(self, num_conversations: int, answer: Callable[[list[Turn]], Answers]) -> Rounds:
        """Rounds of all conversations; the histories hold what `answer` gave."""
        histories: Answers = [[] for _ in range(num_conversations)]
        for _ in range(6):
            messages = self.lens(num_conversations, 40, 90)
            answers = self.lens(num_conversations, 100, 210)
            turns = []
            for history, message, length in zip(histories, messages, answers, strict=True):
                history += self.tokens(message)
                # six rounds fit into 1,024 positions but rarely: then the oldest tokens go, as in the paper
                turns.append(Turn(prompt=history[-(1024 - length) :], num_new_tokens=length))
            yield turns
            for history, said in zip(histories, answer(turns), strict=True):
                history += said


def run(llm: LLM, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """One case from an empty cache."""
    maker = Maker(SHAPES[args.shape].vocab_size, args.seed)
    num_tokens = 0

    def answer(turns: list[Turn]) -> Answers:
        nonlocal num_tokens
        params = [
            SamplingParams(temperature=0, max_tokens=turn.num_new_tokens, ignore_eos=True, detokenize=False)
            for turn in turns
        ]
        outputs = llm.generate([{"prompt_token_ids": turn.prompt} for turn in turns], params, use_tqdm=False)
        num_tokens += sum(turn.num_new_tokens for turn in turns)
        num_cached.extend(output.num_cached_tokens for output in outputs)
        num_prompt.extend(len(turn.prompt) for turn in turns)
        return [list(output.outputs[0].token_ids) for output in outputs]

    num_cached: list[int] = []
    num_prompt: list[int] = []
    llm.reset_prefix_cache()
    said: list[Answers] = []
    start = time.perf_counter()
    if case == "chat":
        for _ in maker.chat(args.num_requests // 2, lambda turns: said.append(answer(turns)) or said[-1]):
            pass
    elif case == "retrieval":
        said.append(answer(maker.retrieval(args.num_requests)))
    else:
        said.append(answer(maker.translation(args.num_requests, {"one-shot": 80, "five-shot": 341}[case])))
    elapsed_s = time.perf_counter() - start
    return {
        "tokens_per_s": num_tokens / elapsed_s, "elapsed_s": elapsed_s, "num_output_tokens": num_tokens,
        "num_prompt_tokens": sum(num_prompt), "cached_fraction": sum(num_cached) / sum(num_prompt), "said": said,
    }  # fmt: skip


CASES = ("one-shot", "five-shot", "chat", "retrieval")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case: both engines in turn, after a first run of each that is not counted."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-prefix-") as scratch:
        folder = write_model(SHAPES[args.shape], Path(scratch) / "model", dtype=args.dtype, seed=args.seed)
        engines = {
            is_shared: LLM(
                str(folder), dtype=args.dtype, max_num_seqs=64, enable_prefix_caching=is_shared, show_progress=False
            )
            for is_shared in (True, False)
        }
        for case in args.cases:
            runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for round_number in range(args.repeats + 1):
                for is_shared, llm in engines.items():
                    reply = run(llm, case, args)
                    if round_number:
                        runs[is_shared].append(reply)
            same = runs[True][0].pop("said") == runs[False][0].pop("said")
            rates = {is_shared: [reply["tokens_per_s"] for reply in replies] for is_shared, replies in runs.items()}
            gain = statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True))
            first = runs[True][0]
            note(f"{case}: {gain:.2f}x")
            rows.append(
                {
                    "case": case, "gain": gain, "shared_tokens_per_s": spread(rates[True]),
                    "unshared_tokens_per_s": spread(rates[False]), "cached_fraction": first["cached_fraction"],
                    "num_prompt_tokens": first["num_prompt_tokens"], "num_output_tokens": first["num_output_tokens"],
                    "has_same_tokens": same, "paper_gain": PAPER_GAINS.get(case),
                }
            )  # fmt: skip
    return rows


def print_report(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    print(f"{'case':<12}{'tokens/s shared':>16}{'not shared':>12}{'gain':>8}{'paper':>8}{'prompt cached, %':>18}"
          f"{'same tokens':>13}")
    for row in rows:
        paper = "" if row["paper_gain"] is None else f"{row['paper_gain']:.2f}x"
        print(f"{row['case']:<12}{row['shared_tokens_per_s']['median']:16.1f}"
              f"{row['unshared_tokens_per_s']['median']:12.1f}{row['gain']:7.2f}x{paper:>8}"
              f"{100 * row['cached_fraction']:18.1f}{'yes' if row['has_same_tokens'] else 'NO':>13}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("bench.paper.prefix", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--num-requests", type=int, default=64, help="chat: half as many conversations")
    parser.add_argument("--repeats", type=int, default=3)
    args = parse_sized(parser, argv, SMALL)
    if args.num_requests < 2 or args.repeats < 1:
        parser.error("--num-requests must be 2 or more, and --repeats 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    rows = measure(args)
    print_report(rows)
    result = describe("bench.paper.prefix", arguments, args)
    result |= {"shape": args.shape, "dtype": args.dtype, "num_requests": args.num_requests}
    write_result(result | {"rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
