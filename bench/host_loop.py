"""The host's loop without a device: the real scheduler, block manager and input batch, one step ahead, by part."""

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import Order, first_come_first_served
from jaxpaged.core.request import FinishReason, Request
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.scheduler_output import RunnerOutput, SchedulerOutput, SequenceOutput
from jaxpaged.runner.buckets import make_buckets
from jaxpaged.runner.input_batch import Attending, BuiltBatch, PackedLayout, RowTables, build
from jaxpaged.sampling_params import SamplingParams

BLOCK_SIZE = 16
TOKENS_PER_ROW = 16
"""A step has room for so many tokens for each sequence that may run: prompts are computed in few steps."""


class DevicelessRunner:
    """Builds the inputs of a step as the model runner does, and answers with token 7 for every sample."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        self.buckets = make_buckets(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
        self._blocks_per_seq = max_model_len // BLOCK_SIZE
        self._attending = Attending(tile_size=32, key_chunk_tokens=256, has_decode_tiles=True)
        self._tables = RowTables(max_num_seqs, self._blocks_per_seq)
        self._layouts: dict[Any, PackedLayout] = {}

    def build(self, plan: SchedulerOutput) -> BuiltBatch:
        num_tokens = num_logits = 0
        for sequence, _, num_new_tokens, num_samples in plan.scheduled:
            assert sequence.row is not None
            if not self._tables.is_owned_by(sequence.row, sequence):
                self._tables.claim(sequence.row, sequence)
            num_tokens += num_new_tokens
            num_logits += num_samples
        bucket = self.buckets.pick(num_tokens, num_logits, len(plan.scheduled))
        if bucket not in self._layouts:
            self._layouts[bucket] = PackedLayout(bucket, self._blocks_per_seq, self._attending)
        return build(plan.scheduled, self._tables, self._layouts[bucket], BLOCK_SIZE)

    def read(self, plan: SchedulerOutput) -> RunnerOutput:
        return RunnerOutput(tuple(SequenceOutput((7,) * item.num_samples, (), (), True) for item in plan.scheduled))


class StepTimes(NamedTuple):
    """Seconds of each part of a step."""

    turnover: float
    """Requests ended from outside and requests that came in their place."""
    schedule: float
    build: float
    update: float


class CollectorClock:
    """Seconds that Python's garbage collector took so far; it runs wherever objects are made. Use as a context."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0
        self._started = 0.0

    def _listen(self, phase: str, _: Mapping[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self.elapsed_s += time.perf_counter() - self._started

    def __enter__(self) -> "CollectorClock":
        gc.callbacks.append(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._listen)


class HostLoop:
    """A scheduler with its block manager, and the loop around it.

    Args:
        num_blocks: Of the device pool, the null block included.
    """

    def __init__(
        self, *, max_num_seqs: int, num_blocks: int, max_model_len: int, order: Order = first_come_first_served
    ) -> None:
        budget = max(2048, TOKENS_PER_ROW * max_num_seqs)
        self.runner = DevicelessRunner(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=max_model_len
        )
        self.scheduler = Scheduler(
            block_manager=BlockManager(num_device_blocks=num_blocks, num_host_blocks=0, block_size=BLOCK_SIZE),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            max_num_logits=self.runner.buckets.max_num_logits,
            order=order,
        )
        self.max_model_len = max_model_len
        self._tokens = tuple(range(4, 4 + max_model_len))
        self.last_plan: SchedulerOutput | None = None
        self._num_added = 0

    @property
    def is_full(self) -> bool:
        """Whether every row decoded in the last step."""
        plan = self.last_plan
        return (
            plan is not None
            and len(plan.scheduled) == self.scheduler.limits.max_num_seqs
            and all(item.num_new_tokens == 1 for item in plan.scheduled)
        )

    def make_request(self, context_len: int, max_tokens: int | None = None, priority: int = 0) -> Request:
        """A request whose prompt of `context_len` tokens shares no block with another's."""
        index, self._num_added = self._num_added, self._num_added + 1
        max_tokens = self.max_model_len - context_len if max_tokens is None else max_tokens
        return Request(
            request_id=str(index),
            prompt_token_ids=(3 + index, *self._tokens[: context_len - 1]),
            params=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False),
            max_tokens=max_tokens,
            arrival_index=index,
            priority=priority,
        )

    def step(self, newcomers: Sequence[Request] = (), *, num_to_end: int = 0, is_built: bool = True) -> StepTimes:
        """One step, after `num_to_end` of the oldest requests were ended, as by a stop string, and newcomers added."""
        scheduler = self.scheduler
        # in the order of the queue of those who run
        ending = self.last_plan.scheduled[:num_to_end] if self.last_plan is not None else ()
        started = time.perf_counter()
        for item in ending:
            scheduler.finish(item.sequence, FinishReason.STOP)
        for request in newcomers:
            scheduler.add(request)
        turned = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        if is_built:
            self.runner.build(plan)
        built = time.perf_counter()
        # the device's answer is made outside the clock
        previous, self.last_plan = self.last_plan, plan
        result = self.runner.read(previous) if previous is not None else None
        read = time.perf_counter()
        if previous is not None and result is not None:
            scheduler.update(previous, result)
        return StepTimes(turned - started, scheduled - turned, built - scheduled, time.perf_counter() - read)
