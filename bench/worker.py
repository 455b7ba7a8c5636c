"""A worker process that answers calls in JSON lines: every engine under test has its own, loaded once and kept warm."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A worker that died or a call that failed; the message is the worker's own last words."""


class Worker:
    """A running worker. Use as a context manager: leaving it ends the process."""

    def __init__(self, python: str, module: str, log: Path) -> None:
        """Start `python -m module`; raise WorkerError with its last line on stderr if it cannot start."""
        self._log = log
        environment = dict(os.environ, PYTHONPATH=str(PROJECT_ROOT))
        with log.open("wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    [python, "-m", module],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True,
                )
            except OSError as error:
                raise WorkerError(f"cannot start {python}: {error.strerror}") from error
        try:
            self.versions: dict[str, str] = self._read()
        except BaseException:
            self.close()
            raise

    def call(self, name: str, **arguments: Any) -> Any:
        """The value that the worker's function `name` returns for `arguments`; waits as long as it takes."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._last_words()) from error
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"the process ended with code {code}"

    def close(self) -> None:
        """End the process: by end of input, and by force if it does not listen."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(functions: Mapping[str, Callable[..., Any]], versions: Mapping[str, str]) -> None:
    """Answer calls until the input ends: the worker's side. Whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply({"value": dict(versions)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = functions[request["call"]](**request["arguments"])
        except Exception as error:
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
        else:
            reply({"value": value})


def peak_memory_bytes() -> int:
    """Most memory this process has held at once.

    VmHWM where there is one: `ru_maxrss` of a child starts at its parent's peak on Linux.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
