"""Where the command line writes: standard streams that are closed or full, and warnings as lines."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

STDERR_NUMBER = 2
ROOMS = ("jaxpaged", "converters", "pallas_kernels")
"""The packages of this project."""


class _Forgiving:
    """A text stream that sends everything nowhere from the first write that fails on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # what is left in its buffer goes there too: else the interpreter would end with an error of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def forgiving_stderr() -> Iterator[None]:
    """Bars, summaries and messages that cannot be written are lost, and not the output with them."""
    stderr = sys.stderr
    if stderr is None:  # closed: its number must not become that of a file
        sink = os.open(os.devnull, os.O_WRONLY)
        if sink != STDERR_NUMBER:
            os.dup2(sink, STDERR_NUMBER)
        sys.stderr = os.fdopen(STDERR_NUMBER, "w", closefd=False)
        yield
        return
    sys.stderr = _Forgiving(stderr)
    try:
        yield
    finally:
        sys.stderr = stderr


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None,
    *, is_quiet: bool,
) -> None:
    """A warning as one line; with --quiet only of what concerns the result, which are those of this project."""
    if is_quiet and _is_foreign(filename):
        return
    # above a progress bar, if there is one
    tqdm.write(f"jaxpaged: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _is_foreign(filename: str) -> bool:
    """Whether a warning was raised for code outside this project: jax, for one, warns of a cache it cannot write."""
    return not any(f"{os.sep}{room}{os.sep}" in filename for room in ROOMS)


def drop_output() -> None:
    """Where stdout takes no more, let the interpreter not complain again when it flushes what is left."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
