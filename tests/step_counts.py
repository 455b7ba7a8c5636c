"""What fixed requests cost the real engine, in counts that no machine and no moment changes.

    python -m tests.step_counts              # print them
    python -m tests.step_counts --update     # write them to step_counts.json, which test_step_counts.py guards

A program of its own: checked annotations and what other tests have compiled would be counted too.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

COUNTS_FILE = Path(__file__).with_suffix(".json")
PACKAGE = str(Path(__file__).resolve().parents[1] / "jaxpaged")


class DeviceTraffic:
    """Counts what goes to the device: calls of compiled programs, and arrays of the host.

    Jitted functions and `jax.device_put` are wrapped before jaxpaged is imported, so that its own calls are all seen.
    """

    def __init__(self) -> None:
        self.num_dispatches = 0
        self.num_transfers = 0
        """Arrays given to `device_put` and numpy arrays given to a compiled program."""
        jit, device_put = jax.jit, jax.device_put

        def counted_jit(*arguments: Any, **options: Any) -> Any:
            function = jit(*arguments, **options)
            return _Counted(function, self) if arguments else function

        def counted_device_put(values: Any, *arguments: Any, **options: Any) -> Any:
            self.num_transfers += sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(values))
            return device_put(values, *arguments, **options)

        jax.jit, jax.device_put = counted_jit, counted_device_put


class _Counted:
    """A jitted function."""

    def __init__(self, function: Any, traffic: DeviceTraffic) -> None:
        self._function = function
        self._traffic = traffic

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves((arguments, options))
        self._traffic.num_dispatches += 1
        self._traffic.num_transfers += sum(isinstance(leaf, np.ndarray) for leaf in leaves)
        return self._function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


TRAFFIC = DeviceTraffic()

from jaxpaged import LLM, BeamSearchParams, SamplingParams  # noqa: E402  (behind the counters)
from jaxpaged.engine.stats import CompileCounter  # noqa: E402
from jaxpaged.llm import DEMO_FOLDER  # noqa: E402


class HostWork:
    """Functions called and lines run of jaxpaged's own code, in its context."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_lines = 0

    def _enter(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # newer Pythons run a comprehension within its function
        self.num_calls += not frame.f_code.co_name.startswith("<")
        return self._follow

    def _follow(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        self.num_lines += event == "line"
        return self._follow

    def __enter__(self) -> "HostWork":
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def prompts(num: int, *, shared: int = 0) -> list[list[int]]:
    """Token ids of `num` prompts of different lengths, with the first `shared` in common."""
    rng = np.random.default_rng(5)
    common = rng.integers(3, 200, shared).tolist()
    return [common + rng.integers(3, 200, 5 + 3 * index).tolist() for index in range(num)]


def greedy(num_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **options)


WORKLOADS: dict[str, tuple[str, list[list[int]], list[SamplingParams | BeamSearchParams]]] = {
    "greedy": ("swap", prompts(8), [greedy(8 + index) for index in range(8)]),
    "one shared prefix": ("swap", prompts(6, shared=40), [greedy(8)] * 6),
    "samples of one prompt": (
        "swap", prompts(3), [SamplingParams(n=4, temperature=0.9, seed=1, max_tokens=10, ignore_eos=True)] * 3,
    ),
    "penalties and logprobs": ("swap", prompts(4), [greedy(8, presence_penalty=0.5, logprobs=2)] * 4),
    "beam search": ("swap", prompts(2), [BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)] * 2),
    "swapped under pressure": ("swap", prompts(8), [greedy(36)] * 8),
    "recomputed under pressure": ("recompute", prompts(8), [greedy(36)] * 8),
}  # fmt: skip
"""Name: what preemption does, prompts and what is asked for each. All share one pool, so that they share programs."""


def measure(name: str) -> dict[str, float]:
    """The counts of one workload: of its steps; programs are those its engine needed beyond the workloads before it."""
    preemption, token_ids, asked = WORKLOADS[name]
    total = CompileCounter()
    with total:
        llm = LLM(
            DEMO_FOLDER, block_size=8, max_num_seqs=16, max_num_batched_tokens=32, num_device_blocks=40,
            host_memory_bytes=2**22, attention_implementation="xla", preemption=preemption, seed=0,
            show_progress=False,
        )  # fmt: skip
        engine = llm.engine
        ids = [
            engine.add_request({"prompt_token_ids": prompt}, params)
            for prompt, params in zip(token_ids, asked, strict=True)
        ]
        llm.warm_up(ids)
    seen: Counter[str] = Counter()
    scheduler, manager = engine.scheduler, engine.scheduler.block_manager
    schedule, allocate = scheduler.schedule, manager.device.allocate

    def counted_schedule() -> Any:
        plan = schedule()
        seen["num_scheduled_tokens"] += sum(item.num_new_tokens for item in plan.scheduled)
        seen["num_scheduled_sequences"] += len(plan.scheduled)
        return plan

    def counted_allocate() -> int:
        seen["num_allocated_blocks"] += 1
        return allocate()

    scheduler.schedule, manager.device.allocate = counted_schedule, counted_allocate  # type: ignore[method-assign]
    num_dispatches, num_transfers = TRAFFIC.num_dispatches, TRAFFIC.num_transfers
    with HostWork() as work:
        while engine.has_unfinished:
            engine.step()
        engine.step()
    stats = engine.stats()
    return {
        "num_steps": stats.num_steps,
        **dict(seen),
        "num_generated_tokens": stats.num_generated_tokens,
        "num_copied_blocks": stats.num_copied_blocks,
        "num_swapped_blocks": stats.num_swapped_out_blocks + stats.num_swapped_in_blocks,
        "num_preemptions": stats.num_preemptions,
        "num_prefix_hit_tokens": manager.prefix_cache.num_hits,
        "num_compiled_programs": total.num_compiles,
        "num_compiles_after_warmup": stats.num_compiles_after_warmup,
        "dispatches_per_step": (TRAFFIC.num_dispatches - num_dispatches) / stats.num_steps,
        "transfers_per_step": (TRAFFIC.num_transfers - num_transfers) / stats.num_steps,
        "host_calls_per_step": work.num_calls / stats.num_steps,
        "host_lines_per_step": work.num_lines / stats.num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.step_counts", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"write them to {COUNTS_FILE.name}")
    args = parser.parse_args()
    counts = {name: measure(name) for name in WORKLOADS}
    text = json.dumps(counts, indent=1) + "\n"
    if args.update:
        COUNTS_FILE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
