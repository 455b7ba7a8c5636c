"""`jaxpaged serve` as a process: listen, load, serve; drain at the first signal, leave at the second."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jaxpaged.llm import LLM
from jaxpaged.server.app import make_app
from jaxpaged.server.async_engine import AsyncEngine, EngineState
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.http_protocol import timed_protocol
from jaxpaged.server.logs import log_to_stderr
from jaxpaged.server.metrics import Metrics

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEAD_LINGER_S = 3.0
"""How long health routes tell that the engine is dead before the process ends with exit code 1."""
CLOSE_TIMEOUT_S = 5.0
"""Time for answers that are ready to leave, once nothing is generated any more."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
logger = logging.getLogger("jaxpaged.server")


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, config: ServerConfig) -> HttpServer:
    """uvicorn with our limits; `serve(sockets=[...])` runs it until `should_exit`."""
    return HttpServer(
        uvicorn.Config(
            app,
            http=timed_protocol(config.header_timeout_s, config.write_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=config.max_header_bytes,
            timeout_keep_alive=max(1, round(config.keep_alive_s)),
            timeout_graceful_shutdown=round(CLOSE_TIMEOUT_S),
            backlog=BACKLOG,
        )
    )


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ValueError where the address is taken or is none of this machine's."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; choose another host or port"
        ) from error


def serve(model: str, load: Callable[[], LLM], config: ServerConfig) -> int:
    """Serve until a signal; returns the exit code. Raises what loading raised."""
    config.read_api_key()
    with listen(config) as listener:  # before the load, which takes long
        log_to_stderr()
        serving = _Serving(model, load, config, listener)
        code, failure = asyncio.run(serving.run())
    if code is None:
        assert failure is not None
        raise failure
    if serving.has_running_thread:
        # it hangs in the device: the interpreter would wait for it, or crash
        sys.stderr.flush()
        os._exit(code)
    return code


class _Serving:
    """One run of the server, from listening to leaving."""

    def __init__(self, model: str, load: Callable[[], LLM], config: ServerConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._model = model
        name = config.served_model_name or model
        self._metrics = Metrics(name)
        self._engine = AsyncEngine(load, config, self._metrics.observe)
        self._http = make_http_server(make_app(self._engine, config, name, self._metrics), config)
        self._num_signals = 0

    @property
    def has_running_thread(self) -> bool:
        return self._engine.has_running_thread

    async def run(self) -> tuple[int | None, BaseException | None]:
        """The exit code (None where the model never loaded) and what killed the engine."""
        engine, loop = self._engine, asyncio.get_running_loop()
        asking = asyncio.Event()
        with self._signals(lambda: loop.call_soon_threadsafe(asking.set)):
            serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
            host, port = self._listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            _log("listening", url=f"http://{shown}:{port}", model=self._model)
            engine.start()
            asked = asyncio.create_task(asking.wait())
            code = await self._until_over(asked)
            asked.cancel()
            self._http.should_exit = True
            await serving
        _log("stopped")
        return code, engine.failure

    async def _until_over(self, asked: "asyncio.Task[Any]") -> int | None:
        engine = self._engine
        ready = asyncio.create_task(
            engine.wait_until(lambda: engine.state in (EngineState.READY, EngineState.DEAD))
        )
        await asyncio.wait((asked, ready), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():  # a signal while loading: nothing was accepted
            ready.cancel()
            _leave_now(0)
        if engine.state is EngineState.DEAD:
            return None
        _log("ready")
        dead = asyncio.create_task(engine.wait_until(lambda: engine.state is EngineState.DEAD))
        await asyncio.wait((asked, dead), return_when=asyncio.FIRST_COMPLETED)
        if not dead.done():
            _log("draining", unfinished=engine.num_unfinished, timeout_s=self._config.drain_timeout_s)
            await engine.close(self._config.drain_timeout_s)
            dead.cancel()
        if engine.state is EngineState.DEAD:
            _log("engine died", error=str(engine.failure))
            await asyncio.sleep(DEAD_LINGER_S)
            return 1
        return 0

    @contextmanager
    def _signals(self, ask: Callable[[], object]) -> Iterator[None]:
        """The first signal asks to drain; the second leaves at once, whatever the loop is doing."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._num_signals += 1
            if self._num_signals > 1:
                os.write(2, b"jaxpaged: left at the second signal\n")
                os._exit(128 + number)
            ask()

        before = {number: signal.signal(number, on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_now(code: int) -> None:
    """End the process while its other thread loads or compiles, which cannot be interrupted."""
    _log("stopped")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _log(event: str, **fields: Any) -> None:
    logger.info(event, extra={"fields": fields})
