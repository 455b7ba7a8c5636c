"""The live engine: what its steps take, to fit step costs to, and requests served as they arrive, to check them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.paper.reservation import ReservationGate
from bench.paper.step_costs import StepWork, work_of
from bench.paper.virtual_clock import Arrival, Method, params_of
from bench.workloads import lognormal_lens
from jaxpaged import LLM
from jaxpaged.core.scheduler_output import RunnerOutput, SchedulerOutput
from jaxpaged.core.step_events import StepEvents
from jaxpaged.engine.engine import Engine


@dataclass
class StepTimes:
    """Steps as they were read: what each did, and its seconds from the end of the one before, the host's among them."""

    works: list[StepWork] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __iadd__(self, other: "StepTimes") -> "StepTimes":
        self.works += other.works
        self.seconds += other.seconds
        return self


@contextlib.contextmanager
def recording(engine: Engine) -> Iterator[StepTimes]:
    """Record the engine's steps within the block, in which it is never idle, at the two doors of its scheduler."""
    scheduler, buckets = engine.scheduler, engine.runner.shapes.buckets
    schedule, update = scheduler.schedule, scheduler.update
    times = StepTimes()
    planned: dict[int, tuple[StepWork, float]] = {}
    last_end: float | None = None

    def timed_schedule() -> SchedulerOutput:
        began = time.perf_counter()
        plan = schedule()
        if plan.scheduled:
            planned[id(plan)] = work_of(plan, buckets), began
        return plan

    def timed_update(plan: SchedulerOutput, result: RunnerOutput) -> StepEvents:
        nonlocal last_end
        ended = time.perf_counter()
        work, began = planned.pop(id(plan))
        times.works.append(work)
        times.seconds.append(ended - (began if last_end is None else last_end))
        last_end = ended
        return update(plan, result)

    scheduler.schedule, scheduler.update = timed_schedule, timed_update  # type: ignore[method-assign]
    try:
        yield times
    finally:
        scheduler.schedule, scheduler.update = schedule, update  # type: ignore[method-assign]


def warm_up(llm: LLM, *, num_candidates: Sequence[int] = (), with_sampler: bool = False) -> None:
    """Compile all that any request of the experiment can reach."""
    engine = llm.engine
    engine.warm_up(engine.buckets_for(None), with_sampler=with_sampler, num_candidates=num_candidates)
    engine.warm_up_preemption()


def serve(
    llm: LLM, arrivals: Sequence[Arrival], *, method: Method = "greedy", number: int = 1,
    gate: ReservationGate | None = None, look: Callable[[Engine], None] | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Requests with random prompts, each given to the engine when it arrives; latencies, and counts of the run.

    Args:
        look: Called after each step.
    """
    engine = llm.engine
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, engine.model_config.vocab_size, each.num_prompt_tokens).tolist() for each in arrivals]
    before = engine.stats()
    engine.scheduler.gate = gate
    indices: dict[str, int] = {}
    ended_s = [0.0] * len(arrivals)
    next_arrival = 0
    start = time.perf_counter()
    try:
        while next_arrival < len(arrivals) or engine.has_unfinished:
            now = time.perf_counter() - start
            while next_arrival < len(arrivals) and arrivals[next_arrival].arrival_s <= now:
                params = params_of(method, number, arrivals[next_arrival].num_output_tokens, seed + next_arrival)
                indices[engine.add_request({"prompt_token_ids": prompts[next_arrival]}, params)] = next_arrival
                next_arrival += 1
            if not engine.has_unfinished:
                time.sleep(max(0.0, arrivals[next_arrival].arrival_s - now))
                continue
            for output in engine.step():
                if output.finished:
                    index = indices[output.request_id]
                    ended_s[index] = time.perf_counter() - start
                    for completion in output.outputs:
                        if len(completion.token_ids) != arrivals[index].num_output_tokens:
                            raise RuntimeError(f"{output.request_id} gave {len(completion.token_ids)} tokens")
            if look is not None:
                look(engine)
    finally:
        engine.scheduler.gate = None
    after = engine.stats()
    normalized = [
        (end - each.arrival_s) / each.num_output_tokens for end, each in zip(ended_s, arrivals, strict=True)
    ]
    return {
        "normalized_latency_s": float(np.mean(normalized)),
        "requests_per_s": len(arrivals) / max(ended_s),
        "tokens_per_s": sum(number * each.num_output_tokens for each in arrivals) / max(ended_s),
        "num_steps": after.num_steps - before.num_steps,
        "num_preemptions": after.num_preemptions - before.num_preemptions,
        "num_swapped_out_blocks": after.num_swapped_out_blocks - before.num_swapped_out_blocks,
        "num_compiles": after.num_compiles_after_warmup - before.num_compiles_after_warmup,
    }


def measure_steps(
    llm: LLM, method: Method, numbers: Sequence[int], *, bursts: Sequence[int], prompt_means: Sequence[int],
    num_output_tokens: int, seed: int,
) -> StepTimes:  # fmt: skip
    """Times of steps with few and many sequences, short and long contexts: bursts of requests that come at once.

    Args:
        numbers: Samples or beams, taken in turn from burst to burst.
        bursts: Requests of each.
    """
    times = StepTimes()
    rng = np.random.default_rng(seed)
    for prompt_mean in prompt_means:
        for index, num_requests in enumerate(bursts):
            lens = lognormal_lens(rng, num_requests, prompt_mean)
            arrivals = [Arrival(0.0, length, num_output_tokens) for length in lens]
            with recording(llm.engine) as recorded:
                serve(llm, arrivals, method=method, number=numbers[index % len(numbers)], seed=seed + index)
            times += recorded
    return times
