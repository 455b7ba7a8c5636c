"""Whose turn it is: one call at a time drives an engine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """A lock for calls that drive an engine. Calls of other threads wait; a call within a call is an error."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn, which Ctrl-C interrupts, and have it in the block.

        Raises RuntimeError where this thread has it already, as in a signal handler or a destructor: waiting for
        itself it would never end.
        """
        with self._lock:
            if self._is_taken:
                raise RuntimeError(
                    "this thread is within a call of this LLM already (a signal handler, a callback or a destructor?): "
                    "call it when that one has returned, or from another thread, which waits"
                )
            self._is_taken = True
            try:
                yield
            finally:
                self._is_taken = False

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Have the turn in the block if it is free, which is the value given; never wait."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            if self._is_taken:  # by this thread
                yield False
                return
            self._is_taken = True
            try:
                yield True
            finally:
                self._is_taken = False
        finally:
            self._lock.release()
