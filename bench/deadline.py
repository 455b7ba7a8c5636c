"""How a bench ends although a kernel does not: a wait for a device cannot be interrupted, only its process be ended."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

JOB_LIMIT_S = 150.0
"""Many times what any one thing takes to compile and run."""
leave: Callable[[int], None] = os._exit


@contextlib.contextmanager
def given_up_after(limit_s: float, last_words: Callable[[], None]) -> Iterator[None]:
    """A context which, if it takes longer, ends the process by status 1, after `last_words()`."""

    def give_up() -> None:
        last_words()
        leave(1)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
