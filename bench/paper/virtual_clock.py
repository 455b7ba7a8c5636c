"""Requests served on a virtual clock: every plan is the real scheduler's, no model runs, time comes from step costs.

The host is one step ahead, as the engine is: step k + 1 is planned while step k runs, when step k - 1 has been read.
Tokens do not matter, as every output ends by length and nothing is shared by prefix; the scores of beams do, for they
decide which beams fork: gaps between a beam's continuations are drawn from an exponential distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench.paper.reservation import ReservationGate
from bench.paper.step_costs import Costs, work_of
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import FinishReason, Request
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.scheduler_output import Candidate, RunnerOutput, SchedulerOutput, SequenceOutput
from jaxpaged.engine.beams import beam_settings, sampling_params_of
from jaxpaged.runner.buckets import Buckets
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

Method = Literal["greedy", "sampling", "beams"]
TOKEN = 7
NUM_SCORE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def poisson(lens: Sequence[tuple[int, int]], rate: float, seed: int) -> list[Arrival]:
    """Requests with these prompt and output lengths, `rate` of them a second; the same gaps at any rate, scaled."""
    gaps = np.random.default_rng(seed).exponential(1.0, len(lens))
    return [Arrival(float(at / rate), *pair) for at, pair in zip(np.cumsum(gaps), lens, strict=True)]


def params_of(method: Method, number: int, max_tokens: int, seed: int = 0) -> SamplingParams | BeamSearchParams:
    """Of a request that ends by length: one greedy output, or `number` samples or beams."""
    if method == "beams":
        return BeamSearchParams(beam_width=number, max_tokens=max_tokens, ignore_eos=True)
    temperature = 0.0 if method == "greedy" else 1.0
    return SamplingParams(
        n=number, temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )


@dataclass
class Answers:
    """What a runner without a model gives: one token for all, and candidates for beams."""

    seed: int
    mean_gap: float = 1.0
    """Between the log-probabilities of a beam's continuations, best to next."""
    _rows: dict[int, list[tuple[Candidate, ...]]] = field(default_factory=dict)
    _num_drawn: int = 0

    def _candidates(self, number: int) -> tuple[Candidate, ...]:
        rows = self._rows.get(number)
        if rows is None:
            gaps = np.random.default_rng([self.seed, number]).exponential(self.mean_gap, (NUM_SCORE_ROWS, number))
            scores = (-np.cumsum(gaps, axis=1)).tolist()
            rows = [tuple(Candidate(TOKEN + i, score, None) for i, score in enumerate(row)) for row in scores]
            self._rows[number] = rows
        self._num_drawn += 1
        return rows[self._num_drawn % NUM_SCORE_ROWS]

    def read(self, plan: SchedulerOutput) -> RunnerOutput:
        outputs = []
        for item in plan.scheduled:
            beams = item.sequence.request.beams
            found = self._candidates(beams.num_candidates) if beams is not None and item.num_samples else ()
            outputs.append(SequenceOutput((TOKEN,) * item.num_samples, (), (), True, candidates=found))
        return RunnerOutput(tuple(outputs))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the requests run in: the same for all policies."""

    num_slots: int
    block_size: int
    max_model_len: int
    max_num_seqs: int


@dataclass
class Outcome:
    """Of a run: what each request took, and what the steps did."""

    latencies_s: list[float]
    """From arrival to the last token, in the order of arrival."""
    normalized_latencies_s: list[float]
    """The same, a token of the output's length."""
    elapsed_s: float
    num_steps: int
    mean_running: float
    """Requests, over the steps."""
    num_preemptions: int
    percent_blocks_saved: float

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.normalized_latencies_s)
        return {
            "normalized_latency_s": float(np.mean(ordered)),
            "normalized_latency_p99_s": ordered[int(0.99 * (len(ordered) - 1))],
            "requests_per_s": len(ordered) / self.elapsed_s,
            "num_steps": self.num_steps,
            "mean_running": self.mean_running,
            "num_preemptions": self.num_preemptions,
            "percent_blocks_saved": self.percent_blocks_saved,
        }


def make_scheduler(memory: Memory, buckets: Buckets, gate: ReservationGate | None) -> Scheduler:
    scheduler = Scheduler(
        block_manager=BlockManager(
            num_device_blocks=1 + memory.num_slots // memory.block_size, num_host_blocks=0,
            block_size=memory.block_size, enable_prefix_caching=False,
        ),
        max_num_seqs=memory.max_num_seqs, max_num_batched_tokens=buckets.all[-1].num_tokens,
        max_model_len=memory.max_model_len, max_num_logits=buckets.max_num_logits, preemption="recompute",
    )  # fmt: skip
    scheduler.gate = gate
    return scheduler


def make_request(index: int, arrival: Arrival, method: Method, number: int) -> Request:
    asked = params_of(method, number, arrival.num_output_tokens)
    beams = beam_settings(asked, 0) if isinstance(asked, BeamSearchParams) else None
    return Request(
        request_id=str(index), prompt_token_ids=(TOKEN,) * arrival.num_prompt_tokens,
        params=sampling_params_of(asked) if isinstance(asked, BeamSearchParams) else asked,
        max_tokens=arrival.num_output_tokens, arrival_time_s=arrival.arrival_s, arrival_index=index, beams=beams,
    )  # fmt: skip


def simulate(
    arrivals: Sequence[Arrival],
    costs: Costs,
    memory: Memory,
    buckets: Buckets,
    *,
    gate: ReservationGate | None = None,
    method: Method = "greedy",
    number: int = 1,
    answers: Answers | None = None,
) -> Outcome:
    """Serve the requests, which come in order; RuntimeError where one ends otherwise than by its length."""
    answers = answers or Answers(0)
    scheduler = make_scheduler(memory, buckets, gate)
    ended_s = [0.0] * len(arrivals)
    in_flight: tuple[SchedulerOutput, float] | None = None  # a plan, and when it is done
    now, num_steps, sum_running, next_arrival = 0.0, 0, 0, 0
    while scheduler.has_unfinished or in_flight is not None or next_arrival < len(arrivals):
        while next_arrival < len(arrivals) and arrivals[next_arrival].arrival_s <= now:
            scheduler.add(make_request(next_arrival, arrivals[next_arrival], method, number))
            next_arrival += 1
        plan = scheduler.schedule()
        dispatched = None
        if not plan.is_empty:
            began = now if in_flight is None else max(now, in_flight[1])
            dispatched = plan, began + costs.seconds(work_of(plan, buckets))
            num_steps += 1
            sum_running += scheduler.counts().running
        previous, in_flight = in_flight, dispatched
        if previous is not None:
            now = previous[1]
            for sequence in scheduler.update(previous[0], answers.read(previous[0])).finished:
                if sequence.finish_reason is not FinishReason.LENGTH:
                    raise RuntimeError(f"request {sequence.request.request_id} ended by {sequence.finish_reason}")
                ended_s[int(sequence.request.request_id)] = now
        elif dispatched is None and next_arrival < len(arrivals):
            now = max(now, arrivals[next_arrival].arrival_s)
        elif dispatched is None and scheduler.has_unfinished:
            raise RuntimeError("nothing can be scheduled though requests wait: this is a fault of the scheduler")
    latencies = [end - arrival.arrival_s for end, arrival in zip(ended_s, arrivals, strict=True)]
    return Outcome(
        latencies_s=latencies,
        normalized_latencies_s=[
            latency / arrival.num_output_tokens for latency, arrival in zip(latencies, arrivals, strict=True)
        ],
        elapsed_s=now,
        num_steps=num_steps,
        mean_running=sum_running / num_steps,
        num_preemptions=scheduler.num_preemptions,
        percent_blocks_saved=100 * scheduler.block_manager.blocks_saved_fraction,
    )
