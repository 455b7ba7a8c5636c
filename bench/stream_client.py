"""Many streams at once over raw sockets, in a process of its own: what a client of the server costs least.

One thread waits for all sockets and notes when pieces come; what they say is read when the clock has stopped.
"""

import json
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from bench.worker import serve

END = b"data: [DONE]"
TIMEOUT_S = 600.0
"""Without a piece on any stream for so long, the run is given up."""


@dataclass
class Stream:
    """One request and what came back."""

    connection: socket.socket
    started_s: float
    received: list[bytes] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When something came, and how many events ended with it."""
    last_byte: bytes = b""

    def take(self, piece: bytes, now: float) -> None:
        # an event ends in an empty line, which may come in two pieces
        num_events = (self.last_byte + piece).count(b"\n\n")
        self.last_byte = piece[-1:]
        self.received.append(piece)
        if num_events:
            self.arrivals.append((now, num_events))


def run(port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Send all requests at once to /v1/completions on this machine, and read their streams to the end.

    Returns seconds from the first byte sent to the last read, CPU seconds of this process within, and of each stream
    its text, its usage, and the times of its pieces after its request was sent. RuntimeError for an answer that is no
    whole stream.
    """
    contents = [json.dumps(body).encode() for body in bodies]
    cpu_before = time.process_time()
    started_s = time.perf_counter()
    streams = _receive([_send(port, content) for content in contents])
    elapsed_s = time.perf_counter() - started_s
    cpu_s = time.process_time() - cpu_before
    return {"elapsed_s": elapsed_s, "cpu_s": cpu_s, "streams": [_read(stream) for stream in streams]}


def _send(port: int, content: bytes) -> Stream:
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    stream = Stream(connection, time.perf_counter())
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    connection.setblocking(False)
    return stream


def _receive(streams: list[Stream]) -> list[Stream]:
    """Read all streams until the server closes them."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.connection, selectors.EVENT_READ, stream)
        num_open = len(streams)
        while num_open:
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"nothing came on {num_open} streams for {TIMEOUT_S:g} s")
            for key, _ in ready:
                stream = key.data
                piece = stream.connection.recv(2**16)
                if piece:
                    stream.take(piece, time.perf_counter())
                else:
                    selector.unregister(stream.connection)
                    stream.connection.close()
                    num_open -= 1
    return streams


def _read(stream: Stream) -> dict[str, Any]:
    """Text, usage and times of a finished stream."""
    head, _, body = b"".join(stream.received).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"an answer was {head[:40]!r}: {body[:500]!r}")
    lines = [line.removeprefix(b"data: ") for line in _unchunked(body).split(b"\n\n") if line]
    if lines[-1] != END.removeprefix(b"data: "):
        raise RuntimeError(f"a stream ended in {lines[-1][:200]!r}")
    events = [json.loads(line) for line in lines[:-1]]
    if "error" in events[-1]:
        raise RuntimeError(f"a stream ended in an error: {events[-1]['error']['message']}")
    times_s = [now - stream.started_s for now, count in stream.arrivals for _ in range(count)]
    return {
        "text": "".join(choice["text"] for event in events for choice in event["choices"]),
        "usage": events[-1]["usage"],
        # behind the pieces come the usage and the end
        "times_s": times_s[: len(events) - 1],
    }


def _unchunked(body: bytes) -> bytes:
    """A body without the marks of HTTP's chunked coding."""
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        pieces.append(body[:length])
        body = body[length + 2 :]
        if not length:
            break
    return b"".join(pieces)


if __name__ == "__main__":
    serve({"run": run}, {})
