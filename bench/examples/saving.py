"""What sharing saves an example: it runs with and without, warmed up, and both are counted and timed."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxpaged import LLM, RequestOutput

Example = Callable[[LLM, bool], list[RequestOutput]]
"""Runs on an LLM; whether to share what the program itself can share (the prefix cache is the LLM's)."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Of one example."""

    num_prompt_tokens: int
    """Put through the model, or found, without sharing."""
    num_tokens_not_computed: int
    blocks_saved_fraction: float
    """Of the KV blocks that would be held without sharing, averaged over steps."""
    time_ratio: float
    """Seconds without sharing over seconds with it; medians."""
    texts: list[str]

    def report(self) -> str:
        share = 100 * self.num_tokens_not_computed / self.num_prompt_tokens
        return (
            f"{self.num_tokens_not_computed} of {self.num_prompt_tokens} prompt tokens not computed ({share:.0f} %), "
            f"{100 * self.blocks_saved_fraction:.0f} % of the KV blocks saved, {self.time_ratio:.2f}x as fast"
        )


def measure(example: Example, model: str = "demo", repeats: int = 3) -> Saving:
    """Run an example with and without sharing in turn, each first once to compile."""
    engines = {
        is_shared: LLM(model, enable_prefix_caching=is_shared, block_size=16, show_progress=False)
        for is_shared in (True, False)
    }
    seconds: dict[bool, list[float]] = {True: [], False: []}
    computed: dict[bool, int] = {}
    outputs: dict[bool, list[RequestOutput]] = {}
    for round_number in range(repeats + 1):
        for is_shared, llm in engines.items():
            llm.reset_prefix_cache()
            start = time.perf_counter()
            outputs[is_shared] = example(llm, is_shared)
            if round_number:
                seconds[is_shared].append(time.perf_counter() - start)
            computed[is_shared] = sum(
                len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs[is_shared]
            )
    return Saving(
        num_prompt_tokens=computed[False],
        num_tokens_not_computed=computed[False] - computed[True],
        blocks_saved_fraction=engines[True].stats().blocks_saved_fraction,
        time_ratio=statistics.median(seconds[False]) / statistics.median(seconds[True]),
        texts=[one.text for output in outputs[True] for one in output.outputs],
    )


def main(example: Example, description: str) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="as of LLM")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs with and without sharing")
    args = parser.parse_args()
    saving = measure(example, args.model, args.repeats)
    for text in saving.texts:
        print(f"- {text.strip()}")
    print(saving.report())
