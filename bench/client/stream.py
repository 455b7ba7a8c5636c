"""The answer to one streamed completion: its events, read as they come, with when.

What counts, and from when (`bench/README.md` says it to users): a chunk is an event that brings tokens; the clock of a
request starts when it is sent, with the time that a new connection takes.
"""

import json
from typing import Any

DONE = b"[DONE]"
MOST_BODY_BYTES = 4096
"""Kept of an answer that is an error."""
MOST_MESSAGE_CHARS = 300


class StreamError(ValueError):
    """The answer is no whole stream of tokens; the message says what it is."""


class EventSplitter:
    """Cuts a stream of server-sent events into the data of each, wherever its pieces were cut."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that end in `piece`."""
        rest = self._rest + piece
        if b"\r" in rest:
            held = rest[-1:] if rest.endswith(b"\r") else b""  # its \n may be yet to come
            rest = rest[: len(rest) - len(held)].replace(b"\r\n", b"\n") + held
        *events, self._rest = rest.split(b"\n\n")
        return [data for event in events if (data := _data_of(event)) is not None]

    def end(self) -> list[bytes]:
        """What an unended event holds: some servers leave out the last empty line."""
        data = _data_of(self._rest)
        self._rest = b""
        return [data] if data is not None else []


def _data_of(event: bytes) -> bytes | None:
    """The lines of data of an event; None where there are none, as in a comment that keeps a connection alive."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class TokenStream:
    """What came back for one request; give `take` to an exchange, then `finish` says whether it is whole."""

    __slots__ = (
        "_body", "_splitter", "_texts", "chunk_times_s", "finish_reason", "is_done", "last_s", "started_s", "usage",
    )

    def __init__(self, started_s: float, *, keeps_text: bool = False) -> None:
        """`started_s` is when it was sent, by the clock of `take`."""
        self.started_s = started_s
        self.chunk_times_s: list[float] = []
        """When each chunk came: an event that brings tokens."""
        self.last_s = started_s
        """When the last event of the answer itself came: a chunk, or the one with the reason of its end."""
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.is_done = False
        self._splitter = EventSplitter()
        self._texts: list[str] | None = [] if keeps_text else None
        self._body = b""

    @property
    def text(self) -> str:
        return "".join(self._texts or ())

    def take(self, status: int, piece: bytes, now: float) -> None:
        """A piece of the body. StreamError for an event that is none, or is an error."""
        if status != 200:
            self._body += piece[: MOST_BODY_BYTES - len(self._body)]
            return
        for data in self._splitter.feed(piece):
            self._read(data, now)

    def finish(self, status: int, content_type: str) -> None:
        """StreamError unless what came is a whole stream with tokens in it."""
        if status != 200:
            raise StreamError(f"HTTP {status}: {_message_of(self._body)}")
        for data in self._splitter.end():
            self._read(data, self.last_s)
        if not self.chunk_times_s and "event-stream" not in content_type:
            raise StreamError(f"the answer is {content_type or 'of no type'}, not a stream of events")
        if not self.is_done and self.finish_reason is None:
            raise StreamError("the stream ended without [DONE] and without a finish_reason")
        if not self.chunk_times_s:
            raise StreamError("the stream ended without a token")

    def _read(self, data: bytes, now: float) -> None:
        if data == DONE:
            self.is_done = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise StreamError(f"an event is no JSON: {_shown(data)}") from None
        if not isinstance(event, dict):
            raise StreamError(f"an event is no JSON object: {_shown(data)}")
        if event.get("error"):
            raise StreamError(f"an error within the stream: {_message_of(data)}")
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        choices = event.get("choices")
        if not choices:
            return
        try:
            self._read_choice(choices[0], now)
        except (TypeError, AttributeError, KeyError, IndexError):
            raise StreamError(f"an event's choice is not as OpenAI's: {_shown(data)}") from None

    def _read_choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta")
        is_opening = False
        if delta is None:
            text = choice.get("text")
            brings = bool(text)
        else:
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            brings = bool(text) or bool(delta.get("tool_calls"))
            is_opening = "role" in delta
        reason = choice.get("finish_reason")
        # a token may have no text yet (a part of a character); an opening or an end without text brings none
        if brings or not (is_opening or reason):
            self.chunk_times_s.append(now)
        if self._texts is not None and text:
            self._texts.append(text)
        if reason:
            self.finish_reason = str(reason)
        self.last_s = now


def _message_of(body: bytes) -> str:
    """The message in the body of an error, or its beginning."""
    try:
        found = json.loads(body)
    except ValueError:
        return _shown(body)
    if isinstance(found, dict):
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        if message:
            return str(message)[:MOST_MESSAGE_CHARS]
    return _shown(body)


def _shown(data: bytes) -> str:
    text = " ".join(data[:MOST_MESSAGE_CHARS].decode(errors="replace").split())
    return text or "(nothing)"
