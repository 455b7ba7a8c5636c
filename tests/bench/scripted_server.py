"""A server for tests of clients: answers streamed completions as a script says, with known delays and known faults."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return chunk(b"data: " + data + b"\n\n")


def whole(status: bytes, body: Any, headers: bytes = b"") -> bytes:
    content = json.dumps(body).encode()
    length = b"%d" % len(content)
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n%bcontent-length: %b\r\n\r\n%b" % (
        status, headers, length, content,
    )  # fmt: skip


def num_prompt_tokens(body: dict[str, Any]) -> int:
    """Two tokens a word, and five of a chat template."""
    if "messages" in body:
        return 5 + 2 * sum(len(turn["content"].split()) for turn in body["messages"])
    prompt = body["prompt"]
    return len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split())


def tokens(*, ttft_s: float = 0.0, gap_s: float = 0.0, per_chunk: int = 1, has_usage: bool = True) -> Answer:
    """All tokens that were asked for, the first after `ttft_s`, then `per_chunk` more every `gap_s`."""

    async def answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(HEAD)
        is_chat = "messages" in body
        if is_chat:
            writer.write(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        left, wait_s = body["max_tokens"], ttft_s
        while left:
            num = min(left, per_chunk)
            await asyncio.sleep(wait_s)
            text = "x" * num
            choice = {"delta": {"content": text}} if is_chat else {"text": text}
            writer.write(event({"choices": [choice | {"finish_reason": "length" if left == num else None}]}))
            left, wait_s = left - num, gap_s
        if has_usage:
            usage = {"prompt_tokens": num_prompt_tokens(body), "completion_tokens": body["max_tokens"]}
            writer.write(event({"choices": [], "usage": usage}))
        writer.write(event(b"[DONE]") + END)

    return answer


def raw(*pieces: bytes, stays_open: bool = False, pause_s: float = 0.0) -> Answer:
    """These bytes, and then the connection is closed, or stays silent."""

    async def answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if stays_open:
            await asyncio.sleep(60)
        writer.close()

    return answer


class ScriptedServer:
    """Runs in a thread of its own. Request number k is answered by `script[k % len(script)]`; those of a client that

    finds out what words cost (`max_tokens` 1) are answered with tokens at once, and are not counted.
    """

    def __init__(
        self, *script: Answer, models: bytes | None = None, api_key: str | None = None, num_unready: int = 0
    ) -> None:
        """Its first `num_unready` requests are told that it is not ready."""
        self.script = script
        self.num_unready = num_unready
        self.models = models or whole(b"200 OK", {"data": [{"id": "scripted", "max_model_len": 4096}]})
        self.api_key = api_key
        self.bodies: list[dict[str, Any]] = []
        """Of the requests that were counted."""
        self.paths: list[str] = []
        self.num_connections = self.num_open = self.max_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._is_ready = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0, backlog=2048)
        self.port = server.sockets[0].getsockname()[1]
        self._is_ready.set()
        await self._stop.wait()
        server.close()
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while not writer.is_closing():
                await self._on_request(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server ends
        finally:
            writer.close()

    async def _on_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        self.paths.append(path)
        length = next((line for line in head.lower().split("\r\n") if line.startswith("content-length:")), ":0")
        content = await reader.readexactly(int(length.partition(":")[2]))
        if len(self.paths) <= self.num_unready:
            writer.write(whole(b"503 Service Unavailable", {"error": {"message": "loading"}}))
        elif self.api_key is not None and f"authorization: Bearer {self.api_key}\r\n" not in head:
            writer.write(whole(b"401 Unauthorized", {"error": {"message": "no key"}}))
        elif method == "GET":
            writer.write(self.models if path.endswith("/v1/models") else whole(b"404 Not Found", {}))
        else:
            await self._complete(writer, json.loads(content))
        await writer.drain()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        answer = tokens()
        if body["max_tokens"] > 1:
            answer = self.script[len(self.bodies) % len(self.script)]
            self.bodies.append(body)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            await answer(writer, body)
        finally:
            self.num_open -= 1

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        assert self._is_ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
