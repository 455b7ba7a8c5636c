"""One thread owns the device and the KV cache; the event loop sends it requests and gets their outputs."""

import asyncio
import contextlib
import enum
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.engine.stats import EngineStats
from jaxpaged.llm import LLM
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError, refusal, unavailable
from jaxpaged.server.inbox import Inbox, Submission
from jaxpaged.server.reply import Reply, is_terminal

STATS_INTERVAL_S = 0.25
"""How old the published counters may be while requests run; they are exact when the engine is idle."""
EXPIRY_INTERVAL_S = 0.05
MAX_RETRY_AFTER_S = 60

WATCH_INTERVAL_S = 0.5
"""How long a thread may be dead, or hang, before its requests are told."""
logger = logging.getLogger("jaxpaged.server")


class EngineState(enum.StrEnum):
    LOADING = "loading"
    COMPILING = "compiling"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class AsyncEngine:
    """Serves many clients of one event loop with one `LLM`.

    All methods belong to the event loop's thread. Every request that the engine accepts ends in exactly one terminal
    event: a finished output, or an ApiError where time ran out, the server shuts down, or the engine died.

    Args:
        load: Makes the LLM; called in the engine's thread, which alone touches it from then on.
        observe: Called in the engine's thread with every output that leaves the engine.
    """

    def __init__(
        self, load: Callable[[], LLM], config: ServerConfig, observe: Callable[[RequestOutput], None] | None = None
    ) -> None:
        self._load = load
        self._config = config
        self._observe = observe
        self._inbox = Inbox(config.max_queued_requests)
        self._state = EngineState.LOADING
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._llm: LLM | None = None
        self._is_stopped = False
        self.failure: BaseException | None = None
        """What killed the engine."""
        self._busy_since_s: float | None = None
        """time.monotonic of the beginning of the turn that the engine's thread is in; None where it waits."""
        self._hung_since_s: float | None = None
        """The same of a turn that was found to hang."""
        # of the event loop
        self._replies: dict[str, Reply] = {}
        self._num_tokens: dict[str, int] = {}
        self._sum_tokens = 0
        self._changed = asyncio.Event()
        self._recent_ends: list[float] = []
        self.rejected: Counter[str] = Counter()
        """Prompts that were never accepted, by the code of the error."""
        self.failed: Counter[str] = Counter()
        """Accepted prompts that ended in an ApiError, by its code."""
        # of the engine's thread
        self._live: dict[str, Submission] = {}
        self._errors: dict[str, ApiError] = {}
        """Of requests that were aborted for a reason: what their ends are told as."""
        self._stats: EngineStats | None = None
        self._stats_s = self._expiry_s = 0.0
        # between them
        self._lock = threading.Lock()
        self._outbox: dict[str, RequestOutput | ApiError] = {}
        self._is_flush_due = False

    # ---- the event loop's side

    def start(self) -> None:
        """Begin to load, within a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch()

    @property
    def state(self) -> EngineState:
        return self._state

    def _watch(self) -> None:
        """Look now and then whether the thread lives: killed without a word, it cannot tell its requests itself."""
        if self._is_stopped or self._state is EngineState.DEAD:
            return
        if not self._thread.is_alive():
            self._die(RuntimeError("the engine's thread has ended"))
            return
        busy_since_s = self._busy_since_s
        if self._hung_since_s is not None and busy_since_s != self._hung_since_s:
            logger.warning("the engine goes on", extra={"fields": {"hung_s": time.monotonic() - self._hung_since_s}})
            self._hung_since_s = None
        is_late = busy_since_s is not None and time.monotonic() - busy_since_s > self._config.step_timeout_s
        if is_late and self._hung_since_s is None:
            self._hung_since_s = busy_since_s
            error = self._hung()
            logger.error("the engine hangs", extra={"fields": {"error": error.message, "ended": len(self._replies)}})
            # if the engine goes on, they are gone from it; until then nobody waits
            self._inbox.abort(tuple(self._replies))
            self._end_all(ApiError(500, error.message, code=error.code))
        assert self._loop is not None
        self._loop.call_later(min(WATCH_INTERVAL_S, self._config.step_timeout_s), self._watch)

    @property
    def hang(self) -> str | None:
        """What is to be said of a step that takes too long; None while all is well."""
        return None if self._hung_since_s is None else self._hung().message

    def _hung(self) -> ApiError:
        return unavailable(
            f"the engine hangs: a step has taken more than {self._config.step_timeout_s:g} s (step_timeout_s); restart "
            "the server if it does not go on", "engine_hung",
        )

    @property
    def llm(self) -> LLM:
        """The loaded model, for what does not touch the device: its tokenizer, its facts. ApiError 503 before that."""
        if self._llm is None:
            raise self._not_ready()
        return self._llm

    @property
    def stats(self) -> EngineStats | None:
        """The engine's counters at most STATS_INTERVAL_S ago; None before it is loaded."""
        return self._stats

    @property
    def has_running_thread(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_unfinished(self) -> int:
        """Prompts submitted whose terminal event has not been handed over."""
        return len(self._replies)

    def submit(
        self,
        prompts: Sequence[Mapping[str, Any]],
        params: SamplingParams | BeamSearchParams,
        *,
        num_tokens: Sequence[int],
        priority: int = 0,
        is_streamed: bool = False,
        request_id: str | None = None,
    ) -> Reply:
        """Hand prompts to the engine, all or none.

        Args:
            prompts: As `Engine.add_request` takes them.
            num_tokens: For each prompt, the tokens it may take: those of the prompt and the most it may generate.

            request_id: A name for them; one is made where it is None.

        Raises ApiError: 503 while not ready, 429 when there is no room now, 400 when there never is, 409 where the
        name is in use.
        What else is wrong with a prompt comes as the reply's error.
        """
        if self.state is not EngineState.READY:
            self._count(self.rejected, "not_ready", len(prompts))
            raise self._not_ready()
        if self._hung_since_s is not None:
            self._count(self.rejected, "engine_hung", len(prompts))
            raise self._hung()
        self._check_room(len(prompts), sum(num_tokens))
        now = time.monotonic()
        name = request_id or uuid.uuid4().hex
        if f"{name}-0" in self._replies:
            self._count(self.rejected, "duplicate_request_id", len(prompts))
            raise ApiError(
                409, f"request_id {name!r} is in use: choose another, or wait for its end", param="request_id",
                code="duplicate_request_id",
            )
        submissions = [
            Submission(
                request_id=f"{name}-{index}",
                prompt=prompt,
                params=params,
                priority=priority,
                is_streamed=is_streamed,
                submitted_s=now,
            )
            for index, prompt in enumerate(prompts)
        ]
        reply = Reply([submission.request_id for submission in submissions])
        if not self._inbox.submit(submissions):
            raise self._queue_full(len(prompts), f"{self._config.max_queued_requests} requests were just sent to it")
        for submission, count in zip(submissions, num_tokens, strict=True):
            self._replies[submission.request_id] = reply
            self._num_tokens[submission.request_id] = count
            self._sum_tokens += count
        return reply

    def _check_room(self, num_prompts: int, num_tokens: int) -> None:
        config = self._config
        for count, most, name in (
            (num_prompts, config.max_queued_requests, "max_queued_requests"),
            (num_tokens, config.max_queued_tokens, "max_queued_tokens"),
        ):
            if count > most:
                self._count(self.rejected, "request_too_large", num_prompts)
                noun = "prompts" if name == "max_queued_requests" else "prompt and output tokens"
                raise ApiError(
                    400, f"the request has {count} {noun}, and the server takes at most {most} at once ({name}): "
                    "send less in one request", code="request_too_large",
                )
        if len(self._replies) + num_prompts > config.max_queued_requests:
            reason = f"{len(self._replies)} of {config.max_queued_requests} prompts are in it"
            raise self._queue_full(num_prompts, reason)
        if self._sum_tokens + num_tokens > config.max_queued_tokens:
            raise self._queue_full(
                num_prompts, f"its prompts may take {self._sum_tokens} of {config.max_queued_tokens} tokens"
            )

    def _count(self, counts: Counter[str], code: str, number: int) -> None:
        with self._lock:  # either thread
            counts[code] += number

    def _queue_full(self, num_prompts: int, reason: str) -> ApiError:
        self._count(self.rejected, "queue_full", num_prompts)
        return ApiError(
            429, f"the server is full: {reason}; try again later", code="queue_full",
            headers={"retry-after": str(self._retry_after_s())},
        )

    def _retry_after_s(self) -> int:
        """When a place should be free, by how fast requests have ended lately."""
        ends = self._recent_ends
        if len(ends) < 2:
            return 1
        per_end_s = (time.monotonic() - ends[0]) / len(ends)
        return max(1, min(MAX_RETRY_AFTER_S, round(per_end_s * 2)))

    def _not_ready(self) -> ApiError:
        state = self._state
        if state is EngineState.DEAD:
            return unavailable(f"the engine is dead: {_told(self.failure)}; restart the server", "engine_dead", None)
        if state is EngineState.DRAINING:
            return unavailable("the server is shutting down: try another one", "shutting_down")
        return unavailable(f"the model is not ready yet ({state}): try again", "not_ready")

    def abort(self, reply: Reply) -> None:
        """End what has not ended of a reply, within a step; nobody waits for its events any more."""
        if reply.unfinished_ids:
            self._inbox.abort(tuple(reply.unfinished_ids))

    def drain(self) -> None:
        """From here on nothing is accepted; what was goes on."""
        if self._state is not EngineState.DEAD:
            self._set_state(EngineState.DRAINING)

    async def wait_until(self, is_met: Callable[[], bool]) -> None:
        """Wait for a condition on state or requests."""
        while not is_met():
            await self._changed.wait()

    async def close(self, timeout_s: float) -> None:
        """Drain; end with an error what has not ended by then; end the engine's thread. May be called twice."""
        self.drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_until(lambda: not self._replies)
        except TimeoutError:
            with self._lock:
                for request_id in self._replies:
                    message = f"the server shut down before this request had ended: it was given {timeout_s:g} s"
                    self._errors.setdefault(request_id, unavailable(message, "shutting_down"))
            self._inbox.abort(tuple(self._replies))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await self.wait_until(lambda: not self._replies)
        self._inbox.stop()
        if self._llm is not None:
            await asyncio.to_thread(self._thread.join, 10)

    def _flush(self) -> None:
        """In the event loop: hand the outputs that have gathered to their replies."""
        with self._lock:
            events, self._outbox = self._outbox, {}
            self._is_flush_due = False
        for request_id, event in events.items():
            reply = self._replies.get(request_id)
            if reply is None:
                continue
            if is_terminal(event):
                del self._replies[request_id]
                self._sum_tokens -= self._num_tokens.pop(request_id)
                self._recent_ends = [*self._recent_ends[-31:], time.monotonic()]
            reply.put(request_id, event)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            llm = self._load()
            self._stats = llm.stats()
            self._llm = llm
            self._set_state(EngineState.COMPILING)
            llm.warm_up()
            self._stats = llm.stats()
            self._set_state(EngineState.READY)
            self._serve(llm)
            self._is_stopped = True
        except BaseException as error:  # whatever it is: its requests must hear of it
            self._die(error)

    def _serve(self, llm: LLM) -> None:
        engine = llm.engine
        while True:
            self._busy_since_s = None
            orders = self._inbox.take(is_waiting=not engine.has_unfinished)
            self._busy_since_s = time.monotonic()
            for submission in orders.submissions:
                self._add(llm, submission)
            for request_id in orders.aborted_ids:
                engine.abort(request_id)
            if orders.is_to_stop:
                for request_id in list(self._live):
                    engine.abort(request_id)
            self._expire(llm)
            if engine.has_unfinished:
                self._deliver(engine.step())
                if not engine.has_unfinished:
                    engine.step()  # the step behind the last, so that every block comes back
            now = time.monotonic()
            if not engine.has_unfinished or now - self._stats_s > STATS_INTERVAL_S:
                self._stats, self._stats_s = engine.stats(), now
            if orders.is_to_stop and not engine.has_unfinished:
                return

    def _add(self, llm: LLM, submission: Submission) -> None:
        try:
            llm.engine.add_request(
                submission.prompt,
                submission.params,
                request_id=submission.request_id,
                priority=submission.priority,
                is_streamed=submission.is_streamed,
            )
        except ValueError as error:
            self._post({submission.request_id: self._rejection(refusal(error))})
        except Exception as error:  # a fault of ours, and this request's alone
            self._post({submission.request_id: self._rejection(ApiError(500, _told(error), code="internal_error"))})
        else:
            self._live[submission.request_id] = submission

    def _rejection(self, error: ApiError) -> ApiError:
        self._count(self.rejected, error.code or "invalid_value", 1)
        return error

    def _expire(self, llm: LLM) -> None:
        """End requests whose time is over."""
        now = time.monotonic()
        if now - self._expiry_s < EXPIRY_INTERVAL_S:
            return
        self._expiry_s = now
        for request_id, submission in self._live.items():
            waited_s = now - submission.submitted_s
            if waited_s > self._config.request_timeout_s:
                error = ApiError(
                    504, f"the request was not done within {self._config.request_timeout_s:g} s (request_timeout_s): "
                    "ask for fewer tokens", code="request_timeout",
                )
            elif waited_s > self._config.queue_timeout_s and not llm.engine.has_started(request_id):
                error = unavailable(
                    f"the request has waited {self._config.queue_timeout_s:g} s for its turn (queue_timeout_s)",
                    "queue_timeout",
                )
            else:
                continue
            if llm.engine.abort(request_id):
                with self._lock:
                    self._errors[request_id] = error

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        events: dict[str, RequestOutput | ApiError] = {}
        for output in outputs:
            request_id = output.request_id
            if self._observe is not None:
                self._observe(output)
            event: RequestOutput | ApiError = output
            if output.finished:
                self._live.pop(request_id, None)
                with self._lock:
                    error = self._errors.pop(request_id, None)
                if error is not None and any(one.finish_reason == "abort" for one in output.outputs):
                    self._count(self.failed, error.code or "error", 1)
                    event = error
            events[request_id] = event
        self._post(events)

    def _post(self, events: dict[str, RequestOutput | ApiError]) -> None:
        """Leave events for the event loop, which is woken once for all that gather until it comes."""
        if not events:
            return
        with self._lock:
            self._outbox.update(events)
            is_to_wake, self._is_flush_due = not self._is_flush_due, True
        if is_to_wake:
            self._call(self._flush)

    def _call(self, function: Callable[[], Any]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(function)

    def _set_state(self, state: EngineState) -> None:
        with self._lock:
            # what is over stays over, whatever the other thread was about to say
            is_draining = self._state is EngineState.DRAINING and state is not EngineState.DEAD
            if is_draining or self._state is EngineState.DEAD:
                return
            self._state = state
        self._call(self._notify)

    def _die(self, error: BaseException) -> None:
        self.failure = error
        if self._llm is not None:
            with contextlib.suppress(Exception):  # its engine may be in any state: only the counters gain by this
                for request_id in self._live:
                    self._llm.engine.abort(request_id)
                self._stats = self._llm.engine.stats()
        self._set_state(EngineState.DEAD)
        self._call(lambda: self._end_all(ApiError(500, self._not_ready().message, code="engine_dead")))

    def _end_all(self, error: ApiError) -> None:
        """In the event loop, behind the last flush: every request ends with this error."""
        self._flush()
        for request_id, reply in list(self._replies.items()):
            self._count(self.failed, error.code or "error", 1)
            del self._replies[request_id]
            self._sum_tokens -= self._num_tokens.pop(request_id)
            reply.put(request_id, error)
        self._notify()


def _told(error: BaseException | None) -> str:
    """An error in one line."""
    if error is None:
        return "unknown cause"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
