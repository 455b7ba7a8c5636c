"""One run against a server: requests sent when they are due, and what came of each."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.client.http import Connections, HttpError
from bench.client.stream import StreamError, TokenStream

LAG_PROBE_S = 0.05


@dataclass(kw_only=True)
class Outcome:
    """What came of one request. Times in seconds; where `error` says something, nothing else but the start counts."""

    start_s: float
    """When it was sent, from the beginning of the run."""
    delay_s: float
    """How much later than it was due."""
    error: str = ""
    ttft_s: float = 0.0
    latency_s: float = 0.0
    """From its start to the last event of its answer."""
    gaps_s: list[float] = field(default_factory=list)
    """Between chunks."""
    input_len: int | None = None
    """As the server counts; None where it does not."""
    output_len: int | None = None
    text: str = ""

    @property
    def num_chunks(self) -> int:
        return 0 if self.error else 1 + len(self.gaps_s)


@dataclass(kw_only=True)
class LoadRun:
    """All outcomes, in the order of the requests, and what the client itself cost."""

    outcomes: list[Outcome]
    duration_s: float
    """From the first request to the end of the last."""
    cpu_s: float
    """Of the thread that sends and reads."""
    lags_s: list[float]
    """How late a timer of the client was, now and then: what a time may be wrong by."""
    max_concurrent: int


class Sender:
    """Sends requests to one endpoint, over connections that it keeps."""

    def __init__(
        self, connections: Connections, endpoint: str, *, timeout_s: float, keeps_text: bool = False
    ) -> None:
        self._connections, self._endpoint = connections, endpoint
        self._timeout_s, self._keeps_text = timeout_s, keeps_text
        self.num_open = self.max_open = 0

    async def send(self, body: bytes, *, began_s: float, due_s: float) -> Outcome:
        """The outcome of one request, whatever happens to it. `began_s` is by time.perf_counter, `due_s` from there."""
        request = self._connections.target.request(self._endpoint, body)
        started_s = time.perf_counter()
        outcome = Outcome(start_s=started_s - began_s, delay_s=started_s - began_s - due_s)
        stream = TokenStream(started_s, keeps_text=self._keeps_text)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._connections.exchange(request, stream.take)
            stream.finish(response.status, response.headers.get("content-type", ""))
        except TimeoutError:
            outcome.error = f"no end of the answer within {self._timeout_s:g} s"
        except (HttpError, StreamError) as error:
            outcome.error = str(error)
        finally:
            self.num_open -= 1
        if not outcome.error:
            _fill(outcome, stream)
        return outcome


def _fill(outcome: Outcome, stream: TokenStream) -> None:
    times = stream.chunk_times_s
    outcome.ttft_s = times[0] - stream.started_s
    outcome.latency_s = stream.last_s - stream.started_s
    outcome.gaps_s = [later - sooner for sooner, later in zip(times, times[1:], strict=False)]
    usage = stream.usage or {}
    outcome.input_len, outcome.output_len = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    outcome.text = stream.text


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None


async def send_all(
    sender: Sender, bodies: Sequence[bytes], arrivals_s: Sequence[float], *, max_concurrency: int | None,
    tell: Callable[[Outcome], None],
) -> LoadRun:
    """Send each request when it is due, with at most `max_concurrency` at once; `tell` hears of each that has ended."""
    limit = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    lags: list[float] = []
    probe = asyncio.create_task(_probe_lag(lags))
    sender.max_open = 0
    cpu_before, began_s = time.thread_time(), time.perf_counter()

    async def one(body: bytes, due_s: float) -> Outcome:
        if limit is None:
            outcome = await sender.send(body, began_s=began_s, due_s=due_s)
        else:
            async with limit:
                outcome = await sender.send(body, began_s=began_s, due_s=due_s)
        tell(outcome)
        return outcome

    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for body, due_s in zip(bodies, arrivals_s, strict=True):
                wait_s = began_s + due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(group.create_task(one(body, due_s)))
        duration_s = time.perf_counter() - began_s
        cpu_s = time.thread_time() - cpu_before
    finally:
        probe.cancel()
    return LoadRun(
        outcomes=[task.result() for task in tasks], duration_s=duration_s, cpu_s=cpu_s, lags_s=lags or [0.0],
        max_concurrent=sender.max_open,
    )


async def _probe_lag(lags: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        lags.append(max(0.0, time.perf_counter() - due_s))
