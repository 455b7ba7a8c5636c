"""What Ctrl-C does while the command line starts, while it works, and while files are in between two states.

Imports little: it stands before the imports.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SWALLOWED_IN = "_xla_gc_callback"
"""A callback of jax's, run often; the interpreter prints and swallows what is raised there."""


def _are_ours() -> bool:
    """Whether nobody else handles interrupts, and this thread may."""
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and hasattr(signal, "setitimer")
    )


@contextmanager
def exiting_interrupts() -> Iterator[None]:
    """Ctrl-C in this block ends the process at once, with one line on stderr and exit code 130. It is for imports.

    They do not bear a KeyboardInterrupt: extension modules make an ImportError of it, or crash.
    """
    if not _are_ours():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        os.write(2, b"jaxpaged: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Ctrl-C in this block raises KeyboardInterrupt, and again every second until the block is left.

    The interpreter prints and swallows one that comes while a destructor or a callback of compiled code runs, and a
    single one might so be lost.
    """
    if not _are_ours():
        yield
        return
    replaced: list[Any] = []

    def interrupt(number: int, frame: Any) -> None:
        if not replaced:
            replaced.append(signal.signal(signal.SIGALRM, interrupt))
        is_lost = frame is not None and frame.f_code.co_name == SWALLOWED_IN
        signal.setitimer(signal.ITIMER_REAL, 0.05 if is_lost else 1.0)
        if not is_lost:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if replaced:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, replaced[0])
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def held_interrupts(*, told: str = "") -> Iterator[None]:
    """Ctrl-C in this block takes effect at its end: it is for what must not be left half done.

    A block that may take long says so by `told`, which is written to stderr at the first Ctrl-C; a second one then ends
    the process at once, with exit code 130.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGALRM") if hasattr(signal, name)]
    held: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    held = {number: handler for number, handler in held.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or signal.SIGINT not in held:
        yield
        return
    came: dict[int, None] = {}

    def hold(number: int, frame: Any) -> None:
        if told and number == signal.SIGINT:
            if number in came:
                os.write(2, b"interrupted again: left at once\n")
                os._exit(130)
            os.write(2, f"\ninterrupted: {told}\n".encode())
        came[number] = None

    for number in held:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came:
            held[number](number, None)
