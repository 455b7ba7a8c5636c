"""`jaxpaged batch`: a file of requests in OpenAI's batch format to a file of answers, appended as they come.

An answer's id names the line of its request, so that a run that was cut short, even by kill -9, goes on with exactly
the lines that have no answer yet. Memory holds the requests in the engine; what is known of all lines is on disk.
"""

import asyncio
import hashlib
import json
import os
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json
from tqdm import tqdm

from jaxpaged.llm import LLM
from jaxpaged.server.async_engine import AsyncEngine, EngineState
from jaxpaged.server.chat import ChatJob
from jaxpaged.server.completions import CompletionJob
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError
from jaxpaged.server.exchange import to_json
from jaxpaged.server.protocol import ChatBody, CompletionBody, parse_body
from jaxpaged.server.service import Service

JOBS: dict[str, tuple[Any, Any]] = {
    "/v1/completions": (CompletionBody, CompletionJob),
    "/v1/chat/completions": (ChatBody, ChatJob),
}
MAX_CUSTOM_ID_CHARS = 512
LIVE_REQUESTS_PER_SEQUENCE = 2
"""Requests in the engine for each that runs at once, so that one is waiting wherever one ends."""
BATCH_ID = "batch_req_"


class LineError(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class BatchRequest:
    """One line of the file."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


def read_request(line: bytes, number: int) -> BatchRequest:
    """The request of a line. Raises LineError saying what is wrong with it."""
    try:
        values = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise LineError("invalid_json_line", f"this line is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise LineError("invalid_request", "a line must be a JSON object with custom_id, method, url and body")
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise LineError("invalid_custom_id", f"custom_id must be text of 1 to {MAX_CUSTOM_ID_CHARS} characters")
    if values.get("method") != "POST":
        raise LineError("invalid_method", "method must be 'POST'")
    if values.get("url") not in JOBS:
        raise LineError("invalid_url", f"url must be one of {', '.join(JOBS)}")
    if not isinstance(values.get("body"), dict):
        raise LineError("invalid_request", "body must be a JSON object")
    return BatchRequest(number, custom_id, values["url"], values["body"])


def lines_of(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and content of each line that is not empty; None for one that is too long, which is skipped over."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line.strip()


class Ledger:
    """Which lines have an answer, and which custom_ids were seen: on disk where they are many."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a temporary file that goes with the connection
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE answered (number INTEGER PRIMARY KEY, custom_id BLOB)")
        self._database.execute("CREATE TABLE seen (custom_id BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def mark(self, number: int, custom_id: str | None) -> None:
        """Note the answer of a line."""
        self._database.execute("INSERT OR REPLACE INTO answered VALUES (?, ?)", (number, _digest(custom_id)))

    def is_answered(self, number: int, custom_id: str | None) -> bool:
        """Whether a line has its answer. Raises ValueError if that answer is to another custom_id."""
        row = self._database.execute("SELECT custom_id FROM answered WHERE number = ?", (number,)).fetchone()
        if row is not None and row[0] != _digest(custom_id):
            raise ValueError(
                f"line {number} of the requests is not the one whose answer the output has: the answers belong to "
                "another file; give another output, or --overwrite"
            )
        return row is not None

    def first_line(self, custom_id: str, number: int) -> int:
        """The line that had this id first: `number`, if none had."""
        digest = _digest(custom_id)
        self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, number))
        return self._database.execute("SELECT number FROM seen WHERE custom_id = ?", (digest,)).fetchone()[0]

    def close(self) -> None:
        self._database.close()


def _digest(custom_id: str | None) -> bytes:
    # of equal length for all, and none of them that of no id
    return b"" if custom_id is None else hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class AnswerFile:
    """The file of answers; those it has are noted in the ledger."""

    def __init__(self, path: Path, ledger: Ledger, *, is_resumed: bool, is_overwriting: bool) -> None:
        if path.exists() and path.stat().st_size and not (is_resumed or is_overwriting):
            raise ValueError(f"{path} is there already: use --resume to go on with it, or --overwrite to replace it")
        self._path = path
        self._ledger = ledger
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if is_resumed else os.O_TRUNC), 0o644)
        try:
            self._end = self._read()
            os.ftruncate(self._file, self._end)
        except BaseException:
            os.close(self._file)
            raise

    def _read(self) -> int:
        """Note the answers there are; returns where the whole ones end: what follows was cut short."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    name, custom_id = record["id"], record["custom_id"]
                    number = int(name.removeprefix(BATCH_ID))
                    if not name.startswith(BATCH_ID) or not 0 < number < 2**40:
                        raise ValueError("no id of ours")
                    self._ledger.mark(number, custom_id)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{self._path} has a line that is no answer of this command (at byte {end}): give another "
                        "output, or --overwrite"
                    ) from error
                end += len(line)
        return end

    def append(self, number: int, custom_id: str | None, response: Any, error: Any) -> None:
        """Write one answer, whole or not at all. OSError where the disk is full."""
        record = {"id": f"{BATCH_ID}{number}", "custom_id": custom_id, "response": response, "error": error}
        line = to_json(record) + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        except OSError as failure:
            os.ftruncate(self._file, self._end)
            raise OSError(failure.errno, failure.strerror, str(self._path)) from failure
        self._end += len(line)
        self._ledger.mark(number, custom_id)

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


def run_batch(
    requests: str | Path,
    output: str | Path,
    *,
    load: Callable[[], LLM],
    model_name: str,
    is_resumed: bool = False,
    is_overwriting: bool = False,
    is_quiet: bool = False,
) -> int:
    """Answer every line of `requests` that has no answer in `output`; returns the exit code.

    Raises ValueError for files that cannot be used, before a model is loaded, and OSError where the disk is full: what
    is written then is whole, and the next run goes on behind it.
    """
    source = Path(requests)
    if not source.is_file():
        raise ValueError(f"{source} is not a file: give the requests as JSON lines")
    if is_resumed and is_overwriting:
        raise ValueError("resume and overwrite exclude each other: give one")
    if Path(output).exists() and source.samefile(output):
        raise ValueError(f"{source} is named as the answers too: give another output")
    with closing(Ledger()) as ledger, closing(
        AnswerFile(Path(output), ledger, is_resumed=is_resumed, is_overwriting=is_overwriting)
    ) as answers:
        counts = asyncio.run(_Batch(source, answers, ledger, load, model_name, is_quiet).run())
    if not is_quiet:
        print(f"[{counts.num_answered} answered, {counts.num_failed} of them with an error; "
              f"{counts.num_skipped} had an answer before]", file=sys.stderr)  # fmt: skip
    return 0


@dataclass
class BatchCounts:
    num_answered: int = 0
    num_failed: int = 0
    num_skipped: int = 0


class _Batch:
    """One run over a file."""

    def __init__(
        self, source: Path, answers: AnswerFile, ledger: Ledger, load: Callable[[], LLM], model_name: str,
        is_quiet: bool,
    ) -> None:
        self._source = source
        self._answers = answers
        self._ledger = ledger
        self._model_name = model_name
        self._is_quiet = is_quiet
        # no limit but those of the file: it waits for nobody
        self._config = ServerConfig(
            max_queued_requests=1_000_000, max_queued_tokens=2**40, queue_timeout_s=1e7, request_timeout_s=1e7,
            step_timeout_s=1e7,
        )
        self._engine = AsyncEngine(load, self._config)
        self._counts = BatchCounts()

    async def run(self) -> BatchCounts:
        engine = self._engine
        engine.start()
        try:
            await engine.wait_until(lambda: engine.state in (EngineState.READY, EngineState.DEAD))
            self._raise_if_dead()
            service = Service(engine, self._config, self._model_name)
            try:
                await self._answer_all(service)
            finally:
                service.close()
        finally:
            await engine.close(0.1)
        return self._counts

    async def _answer_all(self, service: Service) -> None:
        most = LIVE_REQUESTS_PER_SEQUENCE * service.engine.llm.engine.config.max_num_seqs
        live: set[asyncio.Task[None]] = set()
        try:
            with self._source.open("rb") as file, tqdm(
                desc="Answering", unit="request", disable=self._is_quiet, leave=False
            ) as bar:
                for number, line in lines_of(file, self._config.max_body_bytes):
                    request = self._next(number, line)
                    if request is not None:
                        task = asyncio.create_task(self._answer(service, request))
                        task.add_done_callback(lambda done: bar.update() and None)
                        live.add(task)
                    while len(live) >= most:
                        live = await _finish_some(live)
                while live:
                    live = await _finish_some(live)
        finally:
            for task in live:
                task.cancel()
            await asyncio.gather(*live, return_exceptions=True)

    def _next(self, number: int, line: bytes | None) -> BatchRequest | None:
        """The request of a line that is to be answered; None for one that has its answer, or gets an error here."""
        request: BatchRequest | None = None
        custom_id: str | None = None
        wrong: LineError | None = None
        try:
            if line is None:
                raise LineError("line_too_long", f"this line has more than {self._config.max_body_bytes} bytes")
            request = read_request(line, number)
            custom_id = request.custom_id
            first = self._ledger.first_line(custom_id, number)
            if first != number:
                raise LineError("duplicate_custom_id", f"custom_id {custom_id[:80]!r} is that of line {first} already")
        except LineError as error:
            wrong = error
        if self._ledger.is_answered(number, custom_id):
            self._counts.num_skipped += 1
            return None
        if wrong is not None:
            self._write(number, custom_id, None, {"code": wrong.code, "message": f"line {number}: {wrong.message}"})
            return None
        return request

    async def _answer(self, service: Service, request: BatchRequest) -> None:
        kind, job_type = JOBS[request.url]
        request_id = uuid.uuid4().hex
        try:
            body = parse_body(kind, request.body)
            if body.stream:
                raise ApiError(400, "stream is not accepted in a batch: leave it out", param="stream")
            job = await job_type.start(service, body)
            try:
                status, answer = 200, await job.whole()
            finally:
                service.engine.abort(job.reply)
        except ApiError as error:
            self._raise_if_dead()
            status, answer = error.status, error.body()
        response = {"status_code": status, "request_id": request_id, "body": answer}
        self._write(request.number, request.custom_id, response, None)

    def _write(self, number: int, custom_id: str | None, response: Any, error: Any) -> None:
        self._answers.append(number, custom_id, response, error)
        self._counts.num_answered += 1
        self._counts.num_failed += response is None or response["status_code"] != 200

    def _raise_if_dead(self) -> None:
        """What killed the engine; the lines it had are left for the next run."""
        if self._engine.state is EngineState.DEAD:
            assert self._engine.failure is not None
            raise self._engine.failure


async def _finish_some(live: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait until one is done, raise what it raised, and return the others."""
    done, left = await asyncio.wait(live, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left
