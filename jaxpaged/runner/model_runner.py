"""Carries a plan out on the device: swaps, copies, then one jitted step of model and sampler."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpaged.config import EngineConfig
from jaxpaged.core.request import Request, Sequence
from jaxpaged.core.scheduler_output import (
    Candidate,
    RunnerOutput,
    ScheduledSequence,
    SchedulerOutput,
    SequenceOutput,
    TokenLogprobs,
)
from jaxpaged.core.step_plan import num_logit_rows
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.beam_candidates import rounded_up
from jaxpaged.runner.buckets import Bucket
from jaxpaged.runner.input_batch import BuiltBatch, build
from jaxpaged.runner.kv_cache import MemoryPlan
from jaxpaged.runner.parallel import empty_cache, parallel_over
from jaxpaged.runner.sampler import SamplerState, init_state, load_row, pack_row
from jaxpaged.runner.shapes import RunnerShapes
from jaxpaged.runner.step import jitted, jitted_candidates
from jaxpaged.runner.swap import BlockMover
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.sharding import whole


@dataclass(frozen=True)
class StepArrays:
    """What a dispatched step leaves on the device: small arrays on their way to the host."""

    tokens_and_finite: jax.Array
    """int32 [2, rows]: sampled ids, and 1 where the logit row was finite."""
    logprobs: tuple[jax.Array, ...]
    """Log-probability and rank of each row's token [rows], ids and log-probabilities of the likeliest [rows, k];
    empty in a plain step."""
    candidates: tuple[jax.Array, ...]
    """What `beam_candidates` gives; empty in a step without beams."""


@dataclass(frozen=True)
class InFlight:
    """A dispatched step that has not been read."""

    plan: SchedulerOutput
    batch: BuiltBatch | None
    arrays: StepArrays | None

    def read(self) -> RunnerOutput:
        """Wait for the step and bring its samples to the host, in the order of the plan."""
        if self.batch is None or self.arrays is None:
            return RunnerOutput(())
        tokens, finite = np.asarray(self.arrays.tokens_and_finite)
        token_list, finite_list = tokens.tolist(), finite.tolist()
        logprobs = _LogprobReader(self.arrays) if self.batch.has_logprobs else None
        candidates = tuple(np.asarray(array).tolist() for array in self.arrays.candidates)
        outputs = []
        for item, (first, prompt_rows, num_samples) in zip(self.plan.scheduled, self.batch.spans, strict=True):
            begin = first + prompt_rows
            end = begin + num_samples
            params = item.sequence.request.params
            beams = item.sequence.request.beams
            if beams is not None and num_samples:
                found = _candidates(candidates, begin, beams.num_candidates, logprobs, params.logprobs)
                outputs.append(SequenceOutput((), (), (), all(finite_list[first:end]), found))
                continue
            prompt_entries: tuple[tuple[int, TokenLogprobs], ...] = ()
            entries: tuple[TokenLogprobs, ...] = ()
            if logprobs is not None:
                if prompt_rows:
                    prompt_ids = item.sequence.request.prompt_token_ids
                    prompt_entries = tuple(
                        (
                            item.start + k + 1,
                            logprobs.entry(first + k, prompt_ids[item.start + k + 1], params.prompt_logprobs or 0),
                        )
                        for k in range(prompt_rows)
                    )
                if params.logprobs is not None:
                    entries = tuple(logprobs.entry(row, token_list[row], params.logprobs) for row in range(begin, end))
            outputs.append(
                SequenceOutput(
                    tuple(token_list[begin:end]), entries, prompt_entries, all(finite_list[first:end])
                )
            )
        return RunnerOutput(tuple(outputs))


class _LogprobReader:
    def __init__(self, arrays: StepArrays) -> None:
        self._logprob, self._rank, self._top_ids, self._top = (np.asarray(a).tolist() for a in arrays.logprobs)

    def entry(self, row: int, token_id: int, num_top: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, self._logprob[row], self._rank[row], self.top(row, num_top))

    def top(self, row: int, num_top: int) -> tuple[tuple[int, float], ...]:
        return tuple(zip(self._top_ids[row][:num_top], self._top[row][:num_top], strict=True))


def _candidates(
    arrays: tuple[list, ...], row: int, most: int, logprobs: _LogprobReader | None, num_top: int | None
) -> tuple[Candidate, ...]:
    """The first continuations of a row, with log-probabilities where the request asks for `num_top` others."""
    ids, scores, as_given, ranks = (array[row][:most] for array in arrays)
    if num_top is None or logprobs is None:
        return tuple(Candidate(token_id, score, None) for token_id, score in zip(ids, scores, strict=True))
    top = logprobs.top(row, num_top)
    return tuple(
        Candidate(token_id, score, TokenLogprobs(token_id, logprob, rank, top))
        for token_id, score, logprob, rank in zip(ids, scores, as_given, ranks, strict=True)
    )


class ModelRunner:
    """Owns the weights' leaves, the KV cache and the sampler's state on the device; one thread may use it.

    Args:
        model: An NNX module of `models/`; its leaves are taken once, its graph definition stays in the step's closure.
        plan: The number of blocks to allocate on device and host.
        mesh: The devices that share the model, whose weights were put there by `sharding.Placement`; None for one.
    """

    def __init__(
        self, model: nnx.Module, model_config: ModelConfig, engine_config: EngineConfig, shapes: RunnerShapes,
        plan: MemoryPlan, mesh: Mesh | None = None,
    ) -> None:
        self.shapes = shapes
        self._vocab_size = model_config.vocab_size
        self._num_blocks = plan.num_device_blocks
        self._max_logprobs = min(engine_config.max_logprobs, model_config.vocab_size)
        self._block_size = engine_config.block_size
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        self._leaves: tuple[jax.Array, ...] = tuple(leaves)
        self._parallel = None if mesh is None else parallel_over(mesh, model, shapes.layout, shapes.groups.size)
        self._everywhere = SingleDeviceSharding(next(iter(leaves[0].devices()))) if mesh is None else whole(mesh)
        self._kv: Any = self._init_kv()
        self._state: SamplerState = self._init_state()
        self._tables = shapes.row_tables()
        self._mover = BlockMover(self._kv, plan.num_host_blocks)
        self._load_row = jax.jit(load_row, donate_argnums=0)
        self._step, self._sample = jitted(
            graph, tree, engine_config.attention_implementation, self._block_size, self._max_logprobs, self._parallel
        )
        self._layouts = {bucket: shapes.packed_layout(bucket) for bucket in shapes.buckets.all}
        self._warm: set[Bucket] = set()
        self._warm_samplers: set[int] = set()
        self._warm_candidates: set[tuple[int, int]] = set()
        """(logit rows, candidates)."""

    def _init_kv(self) -> Any:
        """Committed to the device of the weights, so that the way back from pinned memory is a transfer of its own."""
        if self._parallel is None:
            kv = tuple(self.shapes.layout.init(self._num_blocks) for _ in range(self.shapes.groups.size))
            return jax.device_put(kv, self._everywhere)
        return empty_cache(self._parallel, self.shapes.layout, self._num_blocks)

    def _init_state(self) -> SamplerState:
        """Committed from the start too, as what a step with a committed cache gives back is."""
        state = init_state(self.shapes.num_rows, self.shapes.max_model_len, self._vocab_size)
        return jax.device_put(state, self._everywhere)

    def reset(self) -> None:
        """Start from an empty cache and state, after a step failed and took the donated arrays with it."""
        self._kv = self._init_kv()
        self._state = self._init_state()
        self._tables = self.shapes.row_tables()

    def swap(self, plan: SchedulerOutput) -> None:
        """Carry out the plan's swaps. Raises `SwapError` with the cache as it was."""
        if plan.swap_out:
            self._mover.swap_out(self._kv, plan.swap_out)
        if plan.swap_in:
            self._kv = self._mover.swap_in(self._kv, plan.swap_in)

    def build(self, plan: SchedulerOutput) -> BuiltBatch | None:
        """The step's inputs as numpy; host work only, apart from the rows of sequences that the sampler meets anew."""
        if not plan.scheduled:
            return None
        num_tokens = num_logits = 0
        for item in plan.scheduled:
            sequence = item.sequence
            row = sequence.row
            assert row is not None
            if not self._tables.is_owned_by(row, sequence):
                self._claim(row, sequence)
            num_tokens += item.num_new_tokens
            num_logits += num_logit_rows(item)
        bucket = self.shapes.buckets.pick(num_tokens, num_logits, len(plan.scheduled))
        return build(plan.scheduled, self._tables, self._layouts[bucket], self._block_size)

    def dispatch(self, plan: SchedulerOutput, batch: BuiltBatch | None) -> InFlight:
        """Start the plan's copies and its step; returns before the device is done."""
        if plan.copies:
            self._kv = self._mover.copy(self._kv, plan.copies)
        if batch is None:
            return InFlight(plan, None, None)
        arrays = self._run(batch)
        arrays.tokens_and_finite.copy_to_host_async()
        for array in (*(arrays.logprobs if batch.has_logprobs else ()), *arrays.candidates):
            array.copy_to_host_async()
        return InFlight(plan, batch, arrays)

    def _run(self, batch: BuiltBatch) -> StepArrays:
        self._kv, self._state, tokens_and_finite, logits, sampling = self._step(
            self._leaves, self._kv, self._state, batch.packed, batch.layout
        )
        self._warm.add(batch.layout.bucket)
        candidates: tuple[jax.Array, ...] = ()
        if batch.num_candidates:
            # before the sampler, which takes the state
            size = rounded_up(batch.num_candidates, self._vocab_size)
            candidates = jitted_candidates(size)(logits, self._state, sampling)
            self._warm_candidates.add((batch.layout.bucket.num_logits, size))
        if batch.is_plain:
            return StepArrays(tokens_and_finite, (), candidates)
        self._state, tokens_and_finite, logprobs = self._sample(logits, self._state, sampling)
        self._warm_samplers.add(batch.layout.bucket.num_logits)
        return StepArrays(tokens_and_finite, logprobs, candidates)

    def _claim(self, row: int, sequence: Sequence) -> None:
        if self._tables.claim(row, sequence):
            request = sequence.request
            packed = pack_row(
                row=row,
                token_ids=sequence.token_ids,
                params=request.params,
                stop_token_ids=request.stop_token_ids,
                bad_words_token_ids=request.bad_words_token_ids,
                vocab_size=self._vocab_size,
                max_model_len=self.shapes.max_model_len,
            )
            self._state = self._load_row(self._state, packed)

    def cold_buckets(
        self, buckets: Iterable[Bucket], *, with_sampler: bool, num_candidates: Iterable[int] = ()
    ) -> tuple[Bucket, ...]:
        """Those that have not run yet, or not with the sampler or these numbers of candidates if they are asked for."""
        sizes = {rounded_up(number, self._vocab_size) for number in num_candidates}
        return tuple(
            bucket
            for bucket in buckets
            if bucket not in self._warm
            or (with_sampler and bucket.num_logits not in self._warm_samplers)
            or any((bucket.num_logits, size) not in self._warm_candidates for size in sizes)
        )

    def warm_up(self, bucket: Bucket, *, with_sampler: bool, num_candidates: Iterable[int] = ()) -> float:
        """Run one bucket through the ordinary path with a request that writes to the null block; returns seconds."""
        started = time.perf_counter()
        for number in sorted({rounded_up(number, self._vocab_size) for number in num_candidates}):
            beams = replace(self._dummy_batch(bucket, is_random=False), num_candidates=number)
            self.dispatch(SchedulerOutput((), (), (), ()), beams)
        batch = self._dummy_batch(bucket, is_random=with_sampler)
        in_flight = self.dispatch(SchedulerOutput((), (), (), ()), batch)
        assert in_flight.arrays is not None
        jax.block_until_ready(in_flight.arrays.tokens_and_finite)
        return time.perf_counter() - started

    def warm_up_swaps(self) -> None:
        """Compile every block copy and the row loader."""
        self._kv = self._mover.warm_up(self._kv)
        self.warm_up_rows()

    def warm_up_copies(self, num_copies: int) -> None:
        """Compile the copies of 1 to `num_copies` shared blocks that are about to be written."""
        self._kv = self._mover.warm_up_copies(self._kv, num_copies)

    def warm_up_rows(self) -> None:
        """Compile the loading of a row's tokens and lists."""
        packed = pack_row(
            row=self.shapes.num_rows,
            token_ids=[0],
            params=SamplingParams(),
            stop_token_ids=frozenset(),
            bad_words_token_ids=(),
            vocab_size=self._vocab_size,
            max_model_len=self.shapes.max_model_len,
        )
        self._state = self._load_row(self._state, packed)

    def _dummy_batch(self, bucket: Bucket, *, is_random: bool) -> BuiltBatch:
        """A step of the bucket's size whose sequences have null tables: an ordinary case, like padding."""
        layout = self._layouts[bucket]
        num_seqs = max(min(bucket.num_seqs, bucket.num_tokens, bucket.num_logits), 1)
        tables = self.shapes.row_tables()
        lengths = [1] * num_seqs
        lengths[-1] += min(bucket.num_tokens - num_seqs, self.shapes.max_model_len - 1)
        scheduled = []
        params = SamplingParams(temperature=1.0 if is_random else 0.0)
        for length in lengths:
            request = Request(
                request_id="", prompt_token_ids=(0,) * length, params=params, max_tokens=1
            )
            sequence = Sequence(0, request, 0, [0] * length)
            sequence.block_ids = [0] * tables.block_tables.shape[1]
            sequence.row = tables.num_rows
            tables.claim(tables.num_rows, sequence)
            scheduled.append(ScheduledSequence(sequence, 0, length, 1))
        return build(scheduled, tables, layout, self._block_size)

    def measure_costs(self) -> tuple[float, float]:
        """Seconds to copy one block out and in again, and seconds to compute one token of a prompt.

        The step's largest warm bucket and the largest staging size are timed once each, after they were compiled.
        """
        warm = sorted(self._warm)
        bucket = warm[-1] if warm else self.shapes.buckets.all[-1]
        if not warm:
            self.warm_up(bucket, with_sampler=False)
        seconds_per_token = self.warm_up(bucket, with_sampler=False) / bucket.num_tokens
        started = time.perf_counter()
        self._kv, num_blocks = self._mover.time_copies(self._kv)
        return (time.perf_counter() - started) / num_blocks, seconds_per_token
