"""A server over a real socket in this process, and the laws it must keep whenever it is idle."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from jaxpaged import LLM
from jaxpaged.server.app import make_app
from jaxpaged.server.async_engine import AsyncEngine, EngineState
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.metrics import Metrics
from jaxpaged.server.process import listen, make_http_server

MODEL_NAME = "demo"


class RunningServer:
    """What tests see of a server: its address, its engine, and a client."""

    def __init__(self, llm: LLM, engine: AsyncEngine, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.llm = llm
        self.engine = engine
        self.loop = loop
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, prompt: Any = "ROMEO:\n", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 4, **body})

    def chat(self, text: str = "Good morrow.", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 4, **body})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send_raw(self, path: str, body: Any, connection: socket.socket | None = None) -> socket.socket:
        """A POST whose answer nobody has read yet."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        connection = connection or self.connect()
        connection.sendall(head.encode() + content)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric's first line with these labels."""
        for line in self.http.get("/metrics").text.splitlines():
            has_labels = all(f'{key}="{value}"' in line for key, value in labels.items())
            if line.startswith(name + "{") and has_labels:
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def wait_until(self, is_met: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_met():
            assert time.monotonic() < deadline, "this did not come about in time"
            time.sleep(0.002)

    @property
    def num_live(self) -> int:
        """Requests within the engine."""
        return len(self.llm.engine.scheduler.groups)

    def settle(self) -> None:
        """Wait until nothing runs; every request must then have ended, and every block be back."""
        self.wait_until(lambda: self.engine.num_unfinished == 0 and not self.llm.engine.has_unfinished)
        self.wait_until(lambda: self.engine.stats is not None and self.engine.stats.num_used_blocks == 0)
        counts = self.llm.engine.scheduler.counts()
        assert counts.accepted == sum(counts.finished.values()) + counts.running + counts.waiting + counts.swapped
        assert (counts.running, counts.waiting, counts.swapped) == (0, 0, 0)
        self.llm.engine.scheduler.check()
        assert self.engine._sum_tokens == 0


@contextmanager
def running_server(llm: LLM, *, is_checked: bool = True, **options: Any) -> Iterator[RunningServer]:
    """Serve with ServerConfig's `options` on a free port; the laws are checked at the end."""
    config = ServerConfig(**{"port": 0, "log_requests": False, "served_model_name": MODEL_NAME} | options)
    listener = listen(config)
    started: list[RunningServer] = []
    stopping = threading.Event()
    is_up = threading.Event()
    failures: list[BaseException] = []

    async def main() -> None:
        metrics = Metrics(MODEL_NAME)
        engine = AsyncEngine(lambda: llm, config, metrics.observe)
        http = make_http_server(make_app(engine, config, MODEL_NAME, metrics), config)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        engine.start()
        await engine.wait_until(lambda: engine.state in (EngineState.READY, EngineState.DEAD))
        started.append(RunningServer(llm, engine, asyncio.get_running_loop(), listener.getsockname()[1]))
        is_up.set()
        await asyncio.to_thread(stopping.wait)
        await engine.close(5)
        http.should_exit = True
        await serving

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
        finally:
            is_up.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert is_up.wait(300)
        assert started, failures
        server = started[0]
        yield server
        if is_checked:
            server.settle()
    finally:
        if started:
            started[0].http.close()
        stopping.set()
        thread.join(60)
    assert not failures, failures


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    connection.settimeout(30)
    received = b""
    while True:
        piece = connection.recv(65536)
        if not piece:
            return received
        received += piece


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events, which must end in [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
