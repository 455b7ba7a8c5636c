"""Carries a plan out on the device: swaps, copies, then one jitted step of model and sampler."""

import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxpaged.config import EngineConfig
from jaxpaged.core.request import TOKEN_TYPE, Request, Sequence
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
from jaxpaged.runner.input_batch import HAS_GRAMMAR, BuiltBatch, RowTables, build
from jaxpaged.runner.kv_cache import MemoryPlan
from jaxpaged.runner.logit_edits import Edits
from jaxpaged.runner.logits_processors import (
    PROCESSOR_TROUBLE,
    LogitsProcessor,
    Tables,
    init_tables,
    load_arguments,
    pack_arguments,
    trace_processors,
    used_bits,
)
from jaxpaged.runner.parallel import empty_cache, parallel_over
from jaxpaged.runner.sampler import FINE, NOT_FINITE, NOTHING_LEFT, SamplerState, init_state, load_row, pack_row
from jaxpaged.runner.sampler_state import copy_rows, pack_row_copies
from jaxpaged.runner.shapes import RunnerShapes
from jaxpaged.runner.step import jitted, jitted_candidates, jitted_sampler
from jaxpaged.runner.swap import BlockMover
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.sharding import whole

MaskMaker = Callable[[SchedulerOutput, tuple[tuple[int, int, int], ...], int], np.ndarray]
"""Given a plan, its batch's `spans` and the number of logit rows: uint32 [logit rows, words], the tokens that the
grammars of the plan's requests allow next."""
NOTHING_IS_LEFT = (
    "every token is forbidden: allowed_token_ids, bad_words, min_tokens and structured_outputs together leave none; "
    "loosen one of them"
)


@dataclass(frozen=True)
class StepArrays:
    """What a dispatched step leaves on the device: small arrays on their way to the host."""

    tokens_and_status: jax.Array
    """int32 [2, rows]: sampled ids, and each row's status (see `sampler.SamplerOutput`)."""
    logprobs: tuple[jax.Array, ...]
    """Log-probability and rank of each row's token [rows], ids and log-probabilities of the likeliest [rows, k];
    empty in a plain step."""
    candidates: tuple[jax.Array, ...]
    """What `beam_candidates` gives; empty in a step without beams."""


@dataclass(frozen=True)
class Begun:
    """A step whose model was started, and whose tokens nobody samples yet."""

    plan: SchedulerOutput
    batch: BuiltBatch | None
    outputs: tuple[jax.Array, jax.Array, jax.Array] | None
    """What `step.step` gives besides the cache and the state."""

    @property
    def has_grammar(self) -> bool:
        """Whether sampling it takes masks, which depend on the tokens of the step before."""
        extras = None if self.batch is None else self.batch.extras
        return extras is not None and bool((extras & HAS_GRAMMAR).any())


@dataclass(frozen=True)
class InFlight:
    """A dispatched step that has not been read."""

    plan: SchedulerOutput
    batch: BuiltBatch | None
    arrays: StepArrays | None
    processors: tuple[LogitsProcessor, ...] = ()

    def read(self) -> RunnerOutput:
        """Wait for the step and bring its samples to the host, in the order of the plan."""
        if self.batch is None or self.arrays is None:
            return RunnerOutput(())
        tokens, status = np.asarray(self.arrays.tokens_and_status)
        token_list, status_list = tokens.tolist(), status.tolist()
        is_all_fine = bool((status == FINE).all())
        logprobs = _LogprobReader(self.arrays) if self.batch.has_logprobs else None
        candidates = tuple(np.asarray(array).tolist() for array in self.arrays.candidates)
        outputs = []
        for item, (first, prompt_rows, num_samples) in zip(self.plan.scheduled, self.batch.spans, strict=True):
            begin = first + prompt_rows
            end = begin + num_samples
            params = item.sequence.request.params
            worst = FINE if is_all_fine else min(status_list[first:end], default=FINE)
            beams = item.sequence.request.beams
            if beams is not None and num_samples:
                found = _candidates(candidates, begin, beams.num_candidates, logprobs, params.logprobs)
                # a beam whose every continuation is banned has none, which is no fault
                is_sound = worst in (FINE, NOTHING_LEFT)
                outputs.append(SequenceOutput((), (), (), is_sound, self._error(worst), found))
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
                    tuple(token_list[begin:end]), entries, prompt_entries, worst == FINE, self._error(worst)
                )
            )
        return RunnerOutput(tuple(outputs))

    def _error(self, status: int) -> str | None:
        """Why a row of this status is of no use; None where it is fine, or the model's own logits are to blame."""
        if status in (FINE, NOT_FINITE):
            return None
        if status > PROCESSOR_TROUBLE:
            return NOTHING_IS_LEFT
        name = self.processors[PROCESSOR_TROUBLE - status].name
        return f"logits_processors[{name!r}] gave logits that are NaN, or have no finite maximum"


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
        logits_processors: Names and functions (see `logits_processors.trace_processors`).
    """

    def __init__(
        self, model: nnx.Module, model_config: ModelConfig, engine_config: EngineConfig, shapes: RunnerShapes,
        plan: MemoryPlan, mesh: Mesh | None = None, logits_processors: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.shapes = shapes
        self._vocab_size = model_config.vocab_size
        self._num_blocks = plan.num_device_blocks
        self.processors = trace_processors(logits_processors or {}, self._vocab_size, shapes.max_model_len)
        self._block_size = engine_config.block_size
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)
        self._leaves: tuple[jax.Array, ...] = tuple(leaves)
        self._parallel = None if mesh is None else parallel_over(mesh, model, shapes.layout, shapes.groups.size)
        self._everywhere = SingleDeviceSharding(next(iter(leaves[0].devices()))) if mesh is None else whole(mesh)
        self._kv: Any = self._init_kv()
        self._state: SamplerState = self._init_state()
        self._arguments: Tables = self._init_arguments()
        self._no_masks: jax.Array | None = None
        self._tables = self._row_tables()
        self._mover = BlockMover(self._kv, plan.num_host_blocks)
        self._load_row = jax.jit(load_row, donate_argnums=0)
        self._copy_rows = jax.jit(copy_rows, donate_argnums=0)
        self._load_arguments = jax.jit(load_arguments, donate_argnums=0)
        self._step = jitted(
            graph, tree, engine_config.attention_implementation, self._block_size, self._parallel
        )
        max_logprobs = min(engine_config.max_logprobs, self._vocab_size)
        self._logprobs_mode = engine_config.logprobs_mode
        self._sample = jitted_sampler(max_logprobs, self._logprobs_mode, self.processors)
        self._layouts = {bucket: shapes.packed_layout(bucket) for bucket in shapes.buckets.all}
        self._warm: set[Bucket] = set()
        self._warm_samplers: set[tuple[int, bool]] = set()
        """(logit rows, whether with grammars or logits processors)."""
        self._warm_candidates: set[tuple[int, int, bool]] = set()
        """(logit rows, candidates, whether with them)."""

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

    def _init_arguments(self) -> Tables:
        return jax.device_put(init_tables(self.processors, self.shapes.num_rows), self._everywhere)

    def _row_tables(self) -> RowTables:
        return self.shapes.row_tables(lambda params: used_bits(self.processors, params))

    def reset(self) -> None:
        """Start from an empty cache and state, after a step failed and took the donated arrays with it."""
        self._kv = self._init_kv()
        self._state = self._init_state()
        self._arguments = self._init_arguments()
        self._tables = self._row_tables()

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
        copies: list[tuple[int, int]] = []
        to_load: list[Sequence] = []
        for item in plan.scheduled:
            sequence = item.sequence
            row = sequence.row
            assert row is not None
            if not self._tables.is_owned_by(row, sequence) and self._tables.claim(row, sequence):
                origin = self._tables.origin_of(sequence)
                if origin is None:
                    to_load.append(sequence)
                else:
                    copies.append((origin, row))
            num_tokens += item.num_new_tokens
            num_logits += num_logit_rows(item)
        self._fill_rows(copies, to_load)
        bucket = self.shapes.buckets.pick(num_tokens, num_logits, len(plan.scheduled))
        return build(plan.scheduled, self._tables, self._layouts[bucket], self._block_size)

    def begin(self, plan: SchedulerOutput, batch: BuiltBatch | None) -> Begun:
        """Start the plan's copies and its model; returns before the device is done. `finish` is to follow."""
        if plan.copies:
            self._kv = self._mover.copy(self._kv, plan.copies)
        if batch is None:
            return Begun(plan, None, None)
        self._kv, self._state, *outputs = self._step(
            self._leaves, self._kv, self._state, batch.packed, batch.layout
        )
        self._warm.add(batch.layout.bucket)
        return Begun(plan, batch, tuple(outputs))

    def finish(self, begun: Begun, make_masks: MaskMaker | None = None) -> InFlight:
        """Start what samples the tokens of the step begun last; returns before the device is done.

        Args:
            make_masks: Called only where a row of the batch has a grammar.
        """
        plan, batch = begun.plan, begun.batch
        if batch is None or begun.outputs is None:
            return InFlight(plan, None, None)
        arrays = self._start_samplers(begun.outputs, batch, self._edits(begun, batch, make_masks))
        arrays.tokens_and_status.copy_to_host_async()
        for small in (*(arrays.logprobs if batch.has_logprobs else ()), *arrays.candidates):
            small.copy_to_host_async()
        return InFlight(plan, batch, arrays, self.processors)

    def dispatch(self, plan: SchedulerOutput, batch: BuiltBatch | None) -> InFlight:
        """A whole step, in which no row has a grammar."""
        return self.finish(self.begin(plan, batch))

    def _start_samplers(
        self, outputs: tuple[jax.Array, jax.Array, jax.Array], batch: BuiltBatch, edits: Edits | None
    ) -> StepArrays:
        tokens_and_status, logits, sampling = outputs
        num_logits = batch.layout.bucket.num_logits
        candidates: tuple[jax.Array, ...] = ()
        if batch.num_candidates:
            # before the sampler, which takes the state
            size = rounded_up(batch.num_candidates, self._vocab_size)
            choose = jitted_candidates(size, self._logprobs_mode, self.processors)
            candidates = choose(logits, self._state, sampling, edits)
            self._warm_candidates.add((num_logits, size, edits is not None))
        if batch.is_plain:
            return StepArrays(tokens_and_status, (), candidates)
        self._state, tokens_and_status, logprobs = self._sample(logits, self._state, sampling, edits)
        self._warm_samplers.add((num_logits, edits is not None))
        return StepArrays(tokens_and_status, logprobs, candidates)

    def _edits(self, begun: Begun, batch: BuiltBatch, make_masks: MaskMaker | None) -> Edits | None:
        """What samplers read besides where a row has a grammar or a logits processor."""
        if batch.extras is None:
            return None
        num_logits = batch.layout.bucket.num_logits
        if make_masks is not None and begun.has_grammar:
            masks = jax.device_put(make_masks(begun.plan, batch.spans, num_logits), self._everywhere)
        else:
            masks = self._neutral_masks(num_logits)
        return Edits(jax.device_put(batch.extras, self._everywhere), masks, self._arguments)

    def _neutral_masks(self, num_logits: int) -> jax.Array:
        """Masks that nobody reads, for a step without grammars; the latest are kept."""
        if self._no_masks is None or self._no_masks.shape[0] != num_logits:
            words = np.full((num_logits, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            self._no_masks = jax.device_put(words, self._everywhere)
        return self._no_masks

    def _fill_rows(self, copies: List[tuple[int, int]], to_load: Iterable[Sequence]) -> None:
        """Fill the sampler's state of newly claimed rows: those of forks from row to row, others from the host."""
        if copies:
            self._copy_rows_of(copies)
        for sequence in to_load:
            request, row = sequence.request, sequence.row
            assert row is not None
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
            if request.params.logits_processors:
                packed = pack_arguments(self.processors, row, request.params)
                self._arguments = self._load_arguments(self._arguments, packed)

    def _copy_rows_of(self, copies: List[tuple[int, int]]) -> None:
        packed = pack_row_copies(copies, self.shapes.num_rows)
        self._state, self._arguments = self._copy_rows((self._state, self._arguments), packed)

    def cold_buckets(
        self,
        buckets: Iterable[Bucket],
        *,
        with_sampler: bool,
        num_candidates: Iterable[int] = (),
        with_extended: bool = False,
    ) -> tuple[Bucket, ...]:
        """Those that have not run yet, or not with the samplers or numbers of candidates that are asked for."""
        sizes = {rounded_up(number, self._vocab_size) for number in num_candidates}
        kinds = (False, True) if with_extended else (False,)
        return tuple(
            bucket
            for bucket in buckets
            if bucket not in self._warm
            or (with_sampler and (bucket.num_logits, False) not in self._warm_samplers)
            or any((bucket.num_logits, size, kind) not in self._warm_candidates for size in sizes for kind in kinds)
            or (with_extended and (bucket.num_logits, True) not in self._warm_samplers)
        )

    def warm_up(
        self,
        bucket: Bucket,
        *,
        with_sampler: bool,
        num_candidates: Iterable[int] = (),
        with_extended: bool = False,
    ) -> float:
        """Run one bucket through the ordinary path with a request that writes to the null block; returns seconds.

        Args:
            with_extended: Also run the samplers of grammars and logits processors, and load their arguments once.
        """
        started = time.perf_counter()
        sizes = sorted({rounded_up(number, self._vocab_size) for number in num_candidates})
        for number in sizes:
            beams = replace(self._dummy_batch(bucket, is_random=False), num_candidates=number)
            self.dispatch(SchedulerOutput((), (), (), ()), beams)
        batch = self._dummy_batch(bucket, is_random=with_sampler)
        self._run_dummy(batch)
        if with_extended:
            extras = np.zeros(bucket.num_logits, np.int32)
            for number in sizes or [0]:
                self._run_dummy(replace(batch, is_plain=False, extras=extras, num_candidates=number))
            if self.processors:
                packed = pack_arguments(self.processors, self.shapes.num_rows, SamplingParams())
                self._arguments = self._load_arguments(self._arguments, packed)
        return time.perf_counter() - started

    def _run_dummy(self, batch: BuiltBatch) -> None:
        in_flight = self.dispatch(SchedulerOutput((), (), (), ()), batch)
        assert in_flight.arrays is not None
        jax.block_until_ready(in_flight.arrays.tokens_and_status)

    def warm_up_swaps(self) -> None:
        """Compile every block copy and the row loader."""
        self._kv = self._mover.warm_up(self._kv)
        self.warm_up_rows()

    def warm_up_copies(self, num_copies: int) -> None:
        """Compile the copies of 1 to `num_copies` shared blocks that are about to be written."""
        self._kv = self._mover.warm_up_copies(self._kv, num_copies)

    def warm_up_rows(self) -> None:
        """Compile the loading of a row's tokens and lists, and the copying of rows."""
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
        self._copy_rows_of([])

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
            sequence = Sequence(0, request, 0, array(TOKEN_TYPE, [0] * length))
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
