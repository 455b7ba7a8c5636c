"""uvicorn's HTTP protocol with the time limits it lacks: on a request's head, and on a client that does not read."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxpaged.server.errors import ApiError
from jaxpaged.server.exchange import to_json


class TimedProtocol(H11Protocol):
    """Closes connections whose request head does not come, and cuts those that take no more of an answer.

    Made by `timed_protocol`, which knows the limits.
    """

    header_timeout_s: float
    write_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            # aborted, not closed: closing would wait for the client to read what is buffered
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, in the format of all our errors."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _time_head(self) -> None:
        """Run the clock while a head is awaited; it is not wound up again by each byte of it."""
        is_awaited = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if is_awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._head_is_late)
        elif not is_awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        message = f"the head of the request did not come within {self.header_timeout_s:g} s: send it faster"
        self._refuse(ApiError(408, message, code="header_timeout"))

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        content = to_json(error.body())
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        try:
            for event in (
                h11.Response(status_code=error.status, headers=headers), h11.Data(data=content), h11.EndOfMessage()
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # an answer was under way: there is no place for another
        self.transport.close()


def timed_protocol(header_timeout_s: float, write_timeout_s: float) -> type[TimedProtocol]:
    """The protocol with these limits, as uvicorn wants it: a class."""
    limits = {"header_timeout_s": header_timeout_s, "write_timeout_s": write_timeout_s}
    return type("TimedProtocol", (TimedProtocol,), limits)
