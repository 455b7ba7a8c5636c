"""The engine: accepts requests, steps, and publishes what each step gave."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxpaged.config import EngineConfig
from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.group_queue import by_priority, first_come_first_served
from jaxpaged.core.preemption import PreemptionCosts
from jaxpaged.core.request import FinishReason, Request, Sequence, SequenceGroup, TokenLogprobs
from jaxpaged.core.scheduler import WATERMARK_DIVISOR, Scheduler
from jaxpaged.core.scheduler_output import SchedulerOutput
from jaxpaged.core.step_events import StepEvents, TokenEvent
from jaxpaged.engine.beams import beam_settings, end_finder, sampling_params_of
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.grammars import Grammars
from jaxpaged.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxpaged.engine.prompts import Prompt, read_prompt
from jaxpaged.engine.reach import reachable_buckets
from jaxpaged.engine.stats import CompileCounter, EngineStats, FinishedCounts, HostTimes
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.buckets import Bucket
from jaxpaged.runner.input_batch import has_lists, needs_extended_sampler, needs_sampler
from jaxpaged.runner.kv_cache import MemoryPlan
from jaxpaged.runner.logits_processors import check_arguments
from jaxpaged.runner.model_runner import Begun, InFlight, ModelRunner
from jaxpaged.runner.sampler import MAX_BAD_WORD_TOKENS
from jaxpaged.runner.shapes import RunnerShapes
from jaxpaged.runner.swap import SwapError
from jaxpaged.sampling_params import MAX_BAD_WORDS, MAX_STOP_TOKENS, BeamSearchParams, SamplingParams


class EngineDeadError(RuntimeError):
    """The engine met an error it cannot recover from; every request has been ended."""


@dataclass(eq=False)
class _Live:
    """What the engine keeps of a request besides the scheduler's group."""

    request: Request
    group: SequenceGroup
    prompt: str | None
    is_streamed: bool
    arrival_clock_s: float
    """time.perf_counter at arrival; `Request.arrival_time_s` is the wall clock."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    detokenizers: dict[int, Detokenizer] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class Engine:
    """Serves one model. Not thread-safe: one thread at a time drives it (see `turn.Turn`).

    Args:
        tokenizer: May be None; then prompts must be token ids and nothing is detokenized.
        mesh: The devices that share the model, as its weights were put there; None for one device.
        logits_processors: Names and functions that requests may ask for (see `LLM`).
    """

    def __init__(
        self,
        model: nnx.Module,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        shapes: RunnerShapes,
        memory_plan: MemoryPlan,
        *,
        tokenizer: Tokenizer | None,
        mesh: Mesh | None = None,
        logits_processors: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.model_config = model_config
        self.config = engine_config
        self.memory_plan = memory_plan
        self.tokenizer = tokenizer
        self.max_model_len = shapes.max_model_len
        self.host_times = HostTimes()
        self.finished_counts = FinishedCounts()
        self.runner = ModelRunner(
            model, model_config, engine_config, shapes, memory_plan, mesh, logits_processors
        )
        self.scheduler = Scheduler(
            block_manager=BlockManager(
                num_device_blocks=memory_plan.num_device_blocks,
                num_host_blocks=memory_plan.num_host_blocks,
                block_size=engine_config.block_size,
                windows=shapes.groups.windows,
                enable_prefix_caching=engine_config.enable_prefix_caching,
            ),
            max_num_seqs=engine_config.max_num_seqs,
            max_num_batched_tokens=engine_config.max_num_batched_tokens,
            max_model_len=shapes.max_model_len,
            max_num_logits=shapes.buckets.max_num_logits,
            preemption=engine_config.preemption,
            enable_chunked_prefill=engine_config.enable_chunked_prefill,
            order=by_priority if engine_config.scheduling_policy == "priority" else first_come_first_served,
            clock=time.perf_counter,
        )
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._grammars = Grammars(tokenizer, model_config.vocab_size, model_config.eos_token_ids)
        self.scheduler.searches.find_end = end_finder(tokenizer, self._grammars)
        self._seeds = random.Random(engine_config.seed)
        self._live: dict[str, _Live] = {}
        self._num_arrivals = 0
        self._begun: Begun | None = None
        self._in_flight: InFlight | None = None
        self._compiles = CompileCounter()
        self._can_preempt_warmly = False
        self._ended: list[_Live] = []
        """Requests that ended outside a step (aborted, failed), to be published by the next one."""

    # ---- requests

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        is_streamed: bool = False,
    ) -> str:
        """Accept a request, or raise ValueError with the reason; nothing is queued then.

        Args:
            is_streamed: Whether every step publishes what is new, or only the end is.
        """
        if is_streamed and isinstance(params, BeamSearchParams):
            raise ValueError("a beam search has no text before its end: do not stream it")
        content = read_prompt(prompt)
        token_ids = self._tokenize(content.text or "") if content.token_ids is None else content.token_ids
        self._check_prompt(token_ids)
        index = self._num_arrivals
        request = self._resolve(
            token_ids, params, request_id or f"request-{index}", index, priority, content.cache_salt
        )
        structured = params.structured_outputs
        compiled = None if structured is None else self._grammars.compile(structured)
        group = self.scheduler.add(request)
        if compiled is not None:
            self._grammars.admit(request.request_id, compiled)
        self._num_arrivals += 1
        self._live[request.request_id] = _Live(request, group, content.text, is_streamed, time.perf_counter())
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request at once; False if it is unknown or has ended."""
        live = self._live.get(request_id)
        if live is None or not self.scheduler.abort(request_id):
            return False
        self._ended.append(live)
        return True

    @property
    def has_unfinished(self) -> bool:
        return bool(self._live)

    def has_started(self, request_id: str) -> bool:
        """Whether a step has computed some of a request, or it has ended."""
        live = self._live.get(request_id)
        return live is None or live.group.first_scheduled_time_s is not None

    def _tokenize(self, prompt: str) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise ValueError("this model was loaded without a tokenizer: give prompts as prompt_token_ids")
        return tuple(self.tokenizer.encode(prompt))

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len is {self.max_model_len} and at least one "
                "token is to be generated: shorten the prompt or raise max_model_len"
            )
        vocab_size = self.model_config.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                shown = token_id if abs(token_id) < 10**30 else f"of {token_id.bit_length()} bits"
                raise ValueError(
                    f"prompt token id {shown} is not from 0 to {vocab_size - 1}: use the tokenizer of this model"
                )

    def _resolve(
        self, token_ids: tuple[int, ...], asked: SamplingParams | BeamSearchParams, request_id: str, index: int,
        priority: int, cache_salt: str,
    ) -> Request:
        """Check the parameters against this model and fill in what the user left open."""
        params = sampling_params_of(asked) if isinstance(asked, BeamSearchParams) else asked
        if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
            raise ValueError(f"priority={priority!r} is not allowed: it must be an integer")
        if priority and self.config.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} would have no effect: load with scheduling_policy='priority'")
        vocab_size = self.model_config.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            most = min(self.config.max_logprobs, vocab_size)
            if wanted is not None and wanted > most:
                raise ValueError(f"{name}={wanted} is above max_logprobs={most}: lower it, or raise max_logprobs")
        check_arguments(self.runner.processors, params)
        named = {
            "logit_bias": [token_id for token_id, _ in params.logit_bias or ()],
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids or (),
        }
        for name, ids in named.items():
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ValueError(f"{name} names token {token_id}, but the vocabulary has {vocab_size} tokens")
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self._eos_token_ids
        if len(stop_ids) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(stop_ids)} stop tokens, the checkpoint's included; at most {MAX_STOP_TOKENS}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: use stop_token_ids")
        room = self.max_model_len - len(token_ids)
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens}, but a prompt of {len(token_ids)} tokens leaves {room} of "
                f"max_model_len={self.max_model_len}: lower min_tokens or shorten the prompt"
            )
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=min(params.max_tokens if params.max_tokens is not None else room, room),
            stop_token_ids=stop_ids,
            bad_words_token_ids=self._bad_words(params),
            seed=seed & (2**64 - 1),
            arrival_time_s=time.time(),
            arrival_index=index,
            priority=priority,
            cache_salt=cache_salt,
            beams=beam_settings(asked, len(stop_ids)) if isinstance(asked, BeamSearchParams) else None,
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise ValueError("bad_words need a tokenizer: use logit_bias or allowed_token_ids")
        sequences = tuple(tuple(ids) for ids in self.tokenizer.bad_words_token_ids(params.bad_words))
        for word in sequences:
            if len(word) > MAX_BAD_WORD_TOKENS:
                raise ValueError(f"a bad word of {len(word)} tokens: at most {MAX_BAD_WORD_TOKENS} are allowed")
        if len(sequences) > MAX_BAD_WORDS:
            raise ValueError(
                f"bad_words stand for {len(sequences)} token sequences (with and without a space before them); at most "
                f"{MAX_BAD_WORDS} are allowed"
            )
        return sequences

    # ---- steps

    def step(self) -> list[RequestOutput]:
        """Schedule and dispatch one step, then read the one before it; returns what is new.

        With `run_ahead` off, the step that was dispatched is read at once.
        """
        clock = time.perf_counter
        times = self.host_times
        started = clock()
        plan = self.scheduler.schedule()
        times.schedule_s += clock() - started
        if plan.is_empty and self._in_flight is None and self.scheduler.has_unfinished:
            raise EngineDeadError("nothing can be scheduled though requests wait: this is a fault of the scheduler")
        self._begun = None if plan.is_empty else self._begin(plan)
        previous, self._in_flight = self._in_flight, None
        # masks wait for the tokens of the step before, which the device computes no later for it
        if previous is None or self._begun is None or not self._begun.has_grammar:
            self._finish_begun()
        if not self.config.run_ahead:
            previous, self._in_flight = self._in_flight, None
        outputs = self._publish(StepEvents()) if previous is None else self._read(previous)
        self._finish_begun()
        return outputs

    def _begin(self, plan: SchedulerOutput) -> Begun | None:
        """Start the plan's swaps, copies and model; None where nothing of it can run."""
        clock = time.perf_counter
        times = self.host_times
        started = clock()
        try:
            with self._compiles:
                try:
                    self.runner.swap(plan)
                except SwapError:
                    plan = self.scheduler.swap_failed(plan)
                    if plan.is_empty:
                        return None
                batch = self.runner.build(plan)
                built = clock()
                begun = self.runner.begin(plan, batch)
        except Exception as error:  # whatever the device raised, every request it touched must end
            self._fail(error)
            return None
        times.num_steps += 1
        times.build_s += built - started
        times.dispatch_s += clock() - built
        return begun

    def _finish_begun(self) -> None:
        """Start the samplers of the step that was begun, if one was; it is then in flight."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        started = time.perf_counter()
        try:
            with self._compiles:
                self._in_flight = self.runner.finish(begun, self._grammars.masks)
        except Exception as error:  # as above
            self._fail(error)
            return
        self.host_times.dispatch_s += time.perf_counter() - started
        while self._grammars.failures:
            request_id, message = self._grammars.failures.pop()
            if request_id in self._live:
                self._end(self._live[request_id], message)

    def _read(self, in_flight: InFlight) -> list[RequestOutput]:
        clock = time.perf_counter
        times = self.host_times
        started = clock()
        try:
            result = in_flight.read()
        except Exception as error:  # as above: an error of the device shows when its result is read
            self._fail(error)
            return self._publish(StepEvents())
        read = clock()
        events = self.scheduler.update(in_flight.plan, result)
        updated = clock()
        outputs = self._publish(events)
        times.wait_s += read - started
        times.update_s += updated - read
        times.publish_s += clock() - updated
        return outputs

    def _fail(self, error: Exception) -> None:
        """A step failed and may have taken the donated cache with it: end what it held, start from an empty cache."""
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        for live in list(self._live.values()):
            # one that was preempted with its last token still on the device has lost that token
            if any(sequence.row is not None or sequence.num_pending_tokens for sequence in live.group.unfinished):
                self._end(live, message)
        self._begun = self._in_flight = None
        self.scheduler.block_manager.reset_prefix_cache()
        try:
            self.runner.reset()
        except Exception as fatal:
            for live in list(self._live.values()):
                self._end(live, message)
            raise EngineDeadError(f"the KV cache could not be made again after {message}") from fatal

    def _end(self, live: _Live, message: str) -> None:
        """End a request in an error, to be published."""
        for sequence in live.group.unfinished:
            self.scheduler.finish(sequence, FinishReason.ERROR, message)
        self._ended.append(live)

    # ---- publishing

    def _publish(self, events: StepEvents) -> list[RequestOutput]:
        """Turn a step's new tokens into text, look for stop strings, and say what ended or is streamed."""
        now = time.perf_counter()
        touched: dict[str, _Live] = {}
        for position_event in events.prompt_logprobs:
            live = self._live[position_event.group.request.request_id]
            live.prompt_logprobs[position_event.position] = position_event.logprobs
        for event in events.tokens:
            live = self._live[event.sequence.request.request_id]
            touched[live.request.request_id] = live
            try:
                self._append(live, event, now)
            except Exception as error:  # one request's trouble is its own
                self._end(live, f"{type(error).__name__}: {error}")
        for sequence in events.finished:  # one that failed brings no token
            live = self._live[sequence.request.request_id]
            touched[live.request.request_id] = live
        for live in self._ended:
            touched[live.request.request_id] = live
        self._ended.clear()
        outputs = []
        for request_id, live in touched.items():
            is_finished = live.group.is_finished
            if is_finished and live.request.beams is not None:
                self._tell_hypotheses(live, now)
            if is_finished or live.is_streamed:
                outputs.append(self._output(live, is_finished))
            if is_finished:
                del self._live[request_id]
                self._grammars.forget(request_id)
                self._count_finished(live)
        return outputs

    def _append(self, live: _Live, event: TokenEvent, now: float) -> None:
        sequence = event.sequence
        if live.first_token_s is None:
            live.first_token_s = now
        live.last_token_s = now
        if event.logprobs is not None:
            live.logprobs.setdefault(sequence.sample_index, []).append(event.logprobs)
        params = live.request.params
        # a stop token ends the text before itself
        is_stop_token = sequence.is_finished and sequence.finish_reason is FinishReason.STOP
        has_form = params.structured_outputs is not None and not is_stop_token
        is_complete = has_form and self._grammars.follow(sequence)
        detokenizer = self._detokenizer(live, sequence)
        if detokenizer is not None and not is_stop_token:
            detokenizer.append(event.token_id)
            if detokenizer.stop_reason is not None:
                self._stop(sequence, detokenizer.stop_reason)
        if is_complete:
            self._stop(sequence, None)
        if detokenizer is not None and sequence.is_finished:
            detokenizer.finish()
            if detokenizer.stop_reason is not None:
                self._stop(sequence, detokenizer.stop_reason)

    def _stop(self, sequence: Sequence, stop_reason: str | None) -> None:
        """End a sequence whose text or grammar has come to its end, were it with its last token."""
        if not sequence.is_finished:
            self.scheduler.finish(sequence, FinishReason.STOP, stop_reason)
        elif sequence.finish_reason is FinishReason.LENGTH:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stop_reason

    def _detokenizer(self, live: _Live, sequence: Sequence) -> Detokenizer | None:
        if self.tokenizer is None or not live.request.params.detokenize:
            return None
        detokenizer = live.detokenizers.get(sequence.sample_index)
        if detokenizer is None:
            detokenizer = live.detokenizers[sequence.sample_index] = self._make_detokenizer(live)
        return detokenizer

    def _tell_hypotheses(self, live: _Live, now: float) -> None:
        """The texts of what an ended beam search has found; trouble with them makes an error of its end."""
        sequences = live.group.sequences
        if any(sequence.num_output_tokens for sequence in sequences):
            live.first_token_s = live.last_token_s = now
        try:
            for sequence in sequences if self.tokenizer is not None else ():
                detokenizer = live.detokenizers[sequence.sample_index] = self._make_detokenizer(live)
                token_ids = sequence.output_token_ids
                if sequence.finish_reason is FinishReason.STOP and isinstance(sequence.stop_reason, int):
                    token_ids = token_ids[:-1]  # a stop token ends the text before itself
                for token_id in token_ids:
                    detokenizer.append(token_id)
                detokenizer.finish()
        except Exception as error:  # one request's trouble is its own, and the scheduler has done with it
            for sequence in sequences:
                sequence.finish_reason = FinishReason.ERROR
                sequence.stop_reason = f"{type(error).__name__}: {error}"

    def _make_detokenizer(self, live: _Live) -> Detokenizer:
        assert self.tokenizer is not None
        params = live.request.params
        return Detokenizer(
            self.tokenizer,
            prompt_token_ids=live.request.prompt_token_ids,
            stop=tuple(params.stop or ()),
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    def _output(self, live: _Live, is_finished: bool) -> RequestOutput:
        request = live.request
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(live.prompt_logprobs.get(i) for i in range(request.num_prompt_tokens))
        return RequestOutput(
            request_id=request.request_id,
            prompt=live.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=self._completions(live),
            finished=is_finished,
            num_cached_tokens=live.group.num_cached_tokens,
            metrics=self._metrics(live),
        )

    def _completions(self, live: _Live) -> tuple[CompletionOutput, ...]:
        """One per sample; samples that had not forked when the request ended share its first one's end."""
        found = [self._completion(live, sequence) for sequence in live.group.sequences]
        missing = range(len(found), live.request.params.n if live.group.is_finished else 0)
        return (*found, *(replace(found[0], index=index) for index in missing))

    def _completion(self, live: _Live, sequence: Sequence) -> CompletionOutput:
        index = sequence.sample_index
        detokenizer = live.detokenizers.get(index)
        logprobs = None
        cumulative_logprob = sequence.cumulative_logprob
        if live.request.params.logprobs is not None:
            logprobs = sequence.logprobs
            if live.request.beams is None:
                logprobs = tuple(live.logprobs.get(index, ()))
                cumulative_logprob = sum(entry.logprob for entry in logprobs)
        return CompletionOutput(
            index=index,
            text=detokenizer.text if detokenizer is not None else "",
            token_ids=tuple(sequence.output_token_ids),
            cumulative_logprob=cumulative_logprob,
            logprobs=logprobs,
            finish_reason=None if sequence.finish_reason is None else sequence.finish_reason.value,
            stop_reason=sequence.stop_reason,
            score=sequence.score,
        )

    def _metrics(self, live: _Live) -> RequestMetrics:
        def between(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else end - start

        return RequestMetrics(
            arrival_time_s=live.request.arrival_time_s,
            queue_s=between(live.arrival_clock_s, live.group.first_scheduled_time_s),
            prefill_s=between(live.group.first_scheduled_time_s, live.first_token_s),
            decode_s=between(live.first_token_s, live.last_token_s),
            time_to_first_token_s=between(live.arrival_clock_s, live.first_token_s),
            num_preemptions=live.group.num_preemptions,
            num_swapped_blocks=live.group.num_swapped_blocks,
            num_shared_blocks=live.group.num_shared_blocks,
        )

    def _count_finished(self, live: _Live) -> None:
        counts = self.finished_counts
        reasons = {sequence.finish_reason for sequence in live.group.sequences}
        for reason in (FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP):
            if reason in reasons:
                counts.by_reason[reason.value] += 1
                break
        counts.num_prompt_tokens += live.request.num_prompt_tokens
        counts.num_generated_tokens += sum(sequence.num_output_tokens for sequence in live.group.sequences)

    # ---- upkeep

    def needs_sampler(self, request_ids: Iterable[str] | None) -> bool:
        """Whether these requests (any, if None) ask for more than the likeliest token."""
        return request_ids is None or any(needs_sampler(self._live[request_id].request) for request_id in request_ids)

    def num_candidates(self, request_ids: Iterable[str] | None) -> tuple[int, ...]:
        """Numbers of continuations that beams of these requests choose from; none if None."""
        beams = [self._live[request_id].request.beams for request_id in request_ids or ()]
        return tuple({one.num_candidates for one in beams if one is not None})

    def needs_extended_sampler(self, request_ids: Iterable[str] | None) -> bool:
        """Whether these requests (any that may come, if None) ask for grammars or logits processors."""
        if request_ids is None:
            return bool(self.runner.processors) or self._grammars.is_available
        return any(needs_extended_sampler(self._live[request_id].request) for request_id in request_ids)

    def warm_up(
        self,
        buckets: Iterable[Bucket],
        on_bucket: Callable[[Bucket, float], None] | None = None,
        *,
        with_sampler: bool = True,
        num_candidates: Iterable[int] = (),
        with_extended: bool = False,
    ) -> None:
        """Compile and run each bucket that has not run yet, and for its logit rows what is needed of the samplers.

        Args:
            num_candidates: Numbers of continuations that beams choose from.
            with_extended: Also the sampler of grammars and logits processors.
        """
        wanted: dict[str, Any] = {
            "with_sampler": with_sampler, "num_candidates": tuple(num_candidates), "with_extended": with_extended
        }  # fmt: skip
        for bucket in self.runner.cold_buckets(buckets, **wanted):
            seconds = self.runner.warm_up(bucket, **wanted)
            if on_bucket is not None:
                on_bucket(bucket, seconds)

    def buckets_for(self, request_ids: Iterable[str] | None) -> tuple[Bucket, ...]:
        """The buckets that these requests can reach when nothing else runs; all of them if None."""
        buckets = self.runner.shapes.buckets
        if request_ids is None:
            return buckets.all
        ids = tuple(request_ids)
        if not ids:
            return ()
        return reachable_buckets(
            buckets,
            self.scheduler,
            [self._live[request_id].group for request_id in ids],
            can_run_out_of_blocks=self.can_run_out_of_blocks(ids),
        )

    def can_run_out_of_blocks(self, request_ids: Iterable[str] | None) -> bool:
        """Whether these requests at full length, sharing nothing, need more blocks than the device has."""
        if request_ids is None:
            return True
        layout = self.scheduler.block_manager.layout
        need = self.memory_plan.num_device_blocks // WATERMARK_DIVISOR
        for request_id in request_ids:
            request = self._live[request_id].request
            num_tokens = request.num_prompt_tokens + request.max_tokens
            need += request.num_sequences * layout.most_blocks(num_tokens, self.config.max_num_batched_tokens)
        return need >= self.memory_plan.num_device_blocks

    def warm_up_rows_and_copies(self, request_ids: Iterable[str] | None) -> None:
        """Compile what loads the lists of these requests' rows, and what copies blocks that their samples share."""
        if request_ids is None:
            return  # then `warm_up_preemption` does
        requests = [self._live[request_id].request for request_id in request_ids]
        if any(has_lists(request) for request in requests):
            self.runner.warm_up_rows()
        num_copies = sum(request.num_sequences - 1 for request in requests if request.max_tokens > 1)
        if num_copies:
            self.runner.warm_up_copies(num_copies)

    def warm_up_preemption(self) -> None:
        """Compile the block copies, and time them against a prefill where preemption is "auto". Once is enough."""
        if self._can_preempt_warmly:
            return
        self._can_preempt_warmly = True
        self.runner.warm_up_swaps()
        if self.config.preemption == "auto":
            self.measure_costs()

    def measure_costs(self) -> None:
        """Time a block copy and a prefill, for preemption="auto"."""
        seconds_per_block, seconds_per_token = self.runner.measure_costs()
        self.scheduler.costs = PreemptionCosts(
            seconds_per_block_copy=seconds_per_block, seconds_per_prefill_token=seconds_per_token
        )

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing done, while requests run."""
        if self.has_unfinished:
            return False
        self.scheduler.block_manager.reset_prefix_cache()
        return True

    def stats(self) -> EngineStats:
        """The counters now."""
        scheduler, manager, times = self.scheduler, self.scheduler.block_manager, self.host_times
        counts, cache = scheduler.counts(), manager.prefix_cache
        return EngineStats(
            num_blocks=manager.device.num_blocks,
            num_free_blocks=manager.device.num_free,
            num_used_blocks=manager.device.num_referenced,
            num_shared_blocks=manager.device.num_shared,
            blocks_saved_fraction=manager.blocks_saved_fraction,
            num_swapped_out_blocks=manager.num_swapped_out_blocks,
            num_swapped_in_blocks=manager.num_swapped_in_blocks,
            num_copied_blocks=manager.num_copied_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_swap_preemptions=scheduler.num_swap_preemptions,
            num_recompute_preemptions=scheduler.num_preemptions - scheduler.num_swap_preemptions,
            num_failed_swaps=scheduler.num_swap_failures,
            prefix_cache_hit_rate=cache.num_hits / cache.num_queries if cache.num_queries else 0.0,
            num_compiles_after_warmup=self._compiles.num_compiles,
            num_requests_accepted=counts.accepted,
            num_requests_finished=sum(counts.finished.values()),
            num_requests_running=counts.running,
            num_requests_waiting=counts.waiting,
            num_requests_swapped=counts.swapped,
            num_steps=times.num_steps,
            num_prompt_tokens=self.finished_counts.num_prompt_tokens,
            num_generated_tokens=self.finished_counts.num_generated_tokens,
            host_seconds_per_step=times.host_seconds_per_step,
        )
