"""HTTP/1.1 as a load generator needs it: connections kept open, and bodies handed on as they come, with the time.

On asyncio's protocols, not its streams: a piece costs one call, so that one core holds thousands of open streams.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

MOST_BUFFERED_BYTES = 2**26
"""Of a head or a chunk that does not end."""
CONNECT_TIMEOUT_S = 60.0

Take = Callable[[int, bytes, float], None]
"""Called with the status, a piece of the body, and when it came (time.perf_counter)."""


class HttpError(ValueError):
    """What came is no HTTP response, or not a whole one."""


class StaleConnectionError(HttpError):
    """A connection kept open was closed before anything came back: the request may be sent again on a new one."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    is_secure: bool
    prefix: str
    """Path before every endpoint; empty or begins with a slash."""
    api_key: str | None = None

    @classmethod
    def parse(cls, base_url: str, api_key: str | None) -> "Target":
        """Of http://host:port/prefix; a prefix that ends in /v1 is taken without it. ValueError with the remedy."""
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"--base-url {base_url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"--base-url {base_url} is no address of a server: give one like http://127.0.0.1:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("the API key holds characters that no header may have: is its variable set as you meant?")
        return cls(
            host=parts.hostname, port=port or (443 if parts.scheme == "https" else 80),
            is_secure=parts.scheme == "https", prefix=parts.path.rstrip("/").removesuffix("/v1"), api_key=api_key,
        )  # fmt: skip

    def request(self, path: str, content: bytes | None = None) -> bytes:
        """A whole request: GET without content, POST of JSON with it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{'GET' if content is None else 'POST'} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}"]
        lines += ["user-agent: jaxpaged-bench", "accept: text/event-stream, application/json"]
        if self.api_key is not None:
            lines.append(f"authorization: Bearer {self.api_key}")
        if content is not None:
            lines += ["content-type: application/json", f"content-length: {len(content)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (content or b"")


class Response:
    """One response, read as it comes."""

    __slots__ = ("_buffer", "_is_chunked", "_num_left", "headers", "is_complete", "keeps_open", "status")

    def __init__(self) -> None:
        self.status = 0
        """0 until the head has come."""
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self.keeps_open = True
        self._buffer = b""
        self._is_chunked = False
        self._num_left: int | None = None
        """Bytes of a body of known length that are to come; None where it ends with the connection."""

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body that `data` completes. HttpError for what is no HTTP."""
        self._buffer += data
        while not self.status:
            head, mark, rest = self._buffer.partition(b"\r\n\r\n")
            if not mark:
                self._check_buffer("head")
                return []
            self._buffer = rest
            self._read_head(head)
        return self._chunks() if self._is_chunked else self._plain()

    def end(self) -> None:
        """The connection was closed. HttpError unless that is how the body ends."""
        if self.is_complete:
            return
        if not self.status:
            raise HttpError("the connection was closed before an answer came")
        if self._is_chunked or self._num_left is not None:
            raise HttpError("the connection was closed within the answer")
        self.is_complete, self.keeps_open = True, False

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or len(words[1]) != 3 or not words[1].isdecimal():
            raise HttpError(f"an answer begins with {first[:60]!r}, which is no HTTP/1.1")
        if words[1].startswith("1"):  # informational: another head follows
            return
        self.status = int(words[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        connection = self.headers.get("connection", "").lower()
        self.keeps_open = "close" not in connection and (words[0] == "HTTP/1.1" or "keep-alive" in connection)
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self._num_left = 0
        elif not self._is_chunked and length is not None:
            if not length.isdecimal():
                raise HttpError(f"an answer's content-length is {length[:40]!r}")
            self._num_left = int(length)

    def _plain(self) -> list[bytes]:
        piece = self._buffer if self._num_left is None else self._buffer[: self._num_left]
        self._buffer = b""
        if self._num_left is not None:
            self._num_left -= len(piece)
            self.is_complete = not self._num_left
        return [piece] if piece else []

    def _chunks(self) -> list[bytes]:
        buffer, start, pieces = self._buffer, 0, []
        while (line_end := buffer.find(b"\r\n", start)) >= 0:
            text = buffer[start:line_end].partition(b";")[0].strip()
            try:
                size = int(text, 16)
            except ValueError:
                raise HttpError(f"a chunk's size is {text[:40].decode('latin-1')!r}") from None
            begin = line_end + 2
            if size == 0:
                # further headers may stand before the empty line
                end = begin if buffer.startswith(b"\r\n", begin) else buffer.find(b"\r\n\r\n", begin)
                self.is_complete = end >= 0
                break
            if size < 0 or len(buffer) < begin + size + 2:
                break
            if not buffer.startswith(b"\r\n", begin + size):
                raise HttpError(f"a chunk of {size} bytes is longer than it says")
            pieces.append(buffer[begin : begin + size])
            start = begin + size + 2
        self._buffer = buffer[start:]
        self._check_buffer("chunk")
        return pieces

    def _check_buffer(self, what: str) -> None:
        if len(self._buffer) > MOST_BUFFERED_BYTES:
            raise HttpError(f"an answer's {what} has more than {MOST_BUFFERED_BYTES:,} bytes")


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._response = Response()
        self._take: Take | None = None
        self._ended: asyncio.Future[Response] | None = None
        self._num_exchanges = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    async def exchange(self, request: bytes, take: Take) -> Response:
        """Send a request and give the body to `take` as it comes. HttpError, OSError, or what `take` raises."""
        assert self._transport is not None
        self._response, self._take = Response(), take
        self._ended = asyncio.get_running_loop().create_future()
        self._num_exchanges += 1
        try:
            self._transport.write(request)
            return await self._ended
        finally:
            self._take = self._ended = None

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        response, take = self._response, self._take
        if take is None:  # nothing was asked
            self.close()
            return
        try:
            for piece in response.feed(data):
                take(response.status, piece, now)
        except Exception as error:
            self._finish(error)
        else:
            if response.is_complete:
                self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._take is None:
            return
        if self._num_exchanges > 1 and not self._response.status:
            self._finish(StaleConnectionError("a connection that was kept open was closed"))
            return
        if exc is not None:
            self._finish(HttpError(f"the connection broke: {exc}"))
            return
        try:
            self._response.end()
        except HttpError as error:
            self._finish(error)
        else:
            self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        self._take = None
        if error is not None or not self._response.keeps_open:
            self.close()
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(self._response)
            else:
                self._ended.set_exception(error)

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()


class Connections:
    """Connections to one target, kept for the next request. Use as an asynchronous context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._secure = ssl.create_default_context() if target.is_secure else None
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, take: Take) -> Response:
        """As `Connection.exchange`, on one that is free or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._on(connection, request, take)
                except StaleConnectionError:
                    continue
        return await self._on(await self._open(), request, take)

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    Connection, self.target.host, self.target.port, ssl=self._secure
                )
        except TimeoutError:
            raise HttpError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise HttpError(f"no connection: {error.strerror or error}") from error
        return connection

    async def _on(self, connection: Connection, request: bytes, take: Take) -> Response:
        response = None
        try:
            response = await connection.exchange(request, take)
            return response
        finally:
            if response is not None and connection.is_open:
                self._idle.append(connection)
            else:
                connection.close()

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
