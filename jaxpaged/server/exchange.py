"""One HTTP exchange: a body read within its limits, work that ends when its client leaves, a stream of events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError

Result = TypeVar("Result")
logger = logging.getLogger("jaxpaged.server")


class ClientGoneError(Exception):
    """The client has closed its connection: nobody waits for an answer."""


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, which NaN has no place in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class JsonResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


async def read_json_bytes(request: Request, config: ServerConfig) -> bytes:
    """The body of a request that says it is JSON.

    Raises ApiError: 415 for another type, 413 above the limit, 408 if it does not come in time.
    """
    too_large = ApiError(
        413, f"the body is larger than {config.max_body_bytes} bytes (max_body_bytes): send less in one request",
        code="body_too_large",
    )
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or len(length) > 18 or int(length) > config.max_body_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                content += message.get("body", b"")
                if len(content) > config.max_body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        message_text = f"the body did not come within {config.body_timeout_s:g} s (body_timeout_s): send it faster"
        raise ApiError(408, message_text, code="body_timeout") from error
    # behind the body: an answer in front of it may be lost as the connection is closed on what was not read
    _check_kind(request)
    return bytes(content)


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type {kind[:80]!r} is not accepted: send application/json", code="content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not accepted: send the JSON as it is", code="content_encoding")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work that is cancelled when the client leaves, which raises ClientGoneError.

    The body must have been read: what comes behind it can only be the end of the connection.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each chunk as JSON, then [DONE].

    An error before the first chunk is an answer with its status; one behind it goes into the stream. `on_end` is
    called when nothing more is sent, for whatever reason.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], on_end: Callable[[], None]) -> None:
        super().__init__(
            status_code=200, media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_event(send, first)
            try:
                async for chunk in chunks:
                    await _send_event(send, chunk)
            except ApiError as error:
                await _send_event(send, error.body())
            except Exception:  # a fault of ours, and this request's alone: the client must not wait for the rest
                logger.exception("stream failed")
                fault = ApiError(500, "an internal error; the server's log has it", code="internal_error")
                await _send_event(send, fault.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send_event(send: Send, value: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": b"data: " + to_json(value) + b"\n\n", "more_body": True})
