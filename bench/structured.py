"""What does JSON-schema output cost a decode step, and how long is the longest mask?

The same prompts run freely and bound to a schema that never ends, in turn; a step is the difference of two lengths of
output, so prefill is not in it. Masks are timed inside the bound runs. Free rows are greedy and plain: a step bound to
a grammar also pays for a program of its own for the sampler, and cannot be scheduled ahead of its last token. Regime of
the step: memory bandwidth (few sequences) or the matmul rate (many). Ceiling: no cost at all, the masks being made
while the device runs the model.

    python -m bench.structured --shape 110M --num-seqs 32
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import describe_run, note, write_result
from bench.shapes import DTYPES, SHAPES, write_model
from jaxpaged import LLM, SamplingParams, StructuredOutputsParams
from jaxpaged.engine.grammars import Grammars
from jaxpaged.llm import DEMO_FOLDER

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
}


def step_s(llm: LLM, prompts: Sequence[list[int]], structured: StructuredOutputsParams | None, num_steps: int) -> float:
    """Seconds of one decode step of all prompts."""
    seconds = []
    for max_tokens in (2, 2 + num_steps):
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, structured_outputs=structured
        )
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / num_steps


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--num-seqs", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=32, help="decode steps that are timed at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, default=DEMO_FOLDER, help="its ids must fit the shape's vocabulary")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    options = parser.parse_args(arguments)
    if min(options.num_seqs, options.num_steps, options.repeats) < 1:
        parser.error("numbers must be 1 or more")
    shape = SHAPES[options.shape]
    masks_s: list[float] = []
    real = Grammars.masks

    def timed(self: Grammars, *arguments: Any) -> np.ndarray:
        start = time.perf_counter()
        masks = real(self, *arguments)
        masks_s.append(time.perf_counter() - start)
        return masks

    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            write_model(shape, Path(folder), dtype=options.dtype), tokenizer=options.tokenizer,
            max_num_seqs=options.num_seqs, max_num_batched_tokens=max(256, options.num_seqs), show_progress=False,
        )
        rng = np.random.default_rng(0)
        prompts = rng.integers(3, shape.vocab_size, (options.num_seqs, 32)).tolist()
        structured = StructuredOutputsParams(json=SCHEMA)
        kinds: dict[str, StructuredOutputsParams | None] = {"free": None, "json": structured}
        for kind in kinds.values():
            step_s(llm, prompts, kind, 4)  # compiles
        Grammars.masks = timed  # type: ignore[method-assign]
        found: dict[str, list[float]] = {name: [] for name in kinds}
        try:
            for _ in range(options.repeats):
                for name, kind in kinds.items():
                    found[name].append(step_s(llm, prompts, kind, options.num_steps) * 1e3)
        finally:
            Grammars.masks = real  # type: ignore[method-assign]
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratio = statistics.median(json / free for free, json in zip(found["free"], found["json"], strict=True))
    note(f"{options.num_seqs} sequences, {shape.name}, {options.dtype}: a decode step in ms")
    for name, values in found.items():
        note(f"  {name:5} {medians[name]:8.2f}   ({min(values):.2f} to {max(values):.2f})")
    note(f"  json / free, median of pairs: {ratio:.3f}")
    note(f"  all masks of a step: median {statistics.median(masks_s) * 1e3:.2f} ms, worst {max(masks_s) * 1e3:.2f} ms")
    result = {
        **describe_run("bench.structured", arguments),
        "shape": shape.name,
        "dtype": options.dtype,
        "num_seqs": options.num_seqs,
        "step_ms": {name: {"median": medians[name], "all": values} for name, values in found.items()},
        "ratio": ratio,
        "masks_of_a_step_ms": {"median": statistics.median(masks_s) * 1e3, "worst": max(masks_s) * 1e3},
    }
    write_result(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
