"""The Orbax library: imported when it is used, quiet, its faults named, and never left while it still writes."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxpaged.interrupts import held_interrupts

LONGEST_WAIT_S = 600.0
"""For what is under way when an event loop is closed."""
OF_NO_USE = ("Skipping merge of OCDBT", "_SignalingThread.run() raised an exception")
"""What Orbax logs of a database to merge, when we make none, and of an exception that it raises too."""


def library() -> Any:
    """Return orbax.checkpoint. Extension modules make an ImportError of a Ctrl-C: it waits for the import."""
    with held_interrupts():
        import orbax.checkpoint as ocp  # noqa: PLC0415  optional, and slow to import

    return ocp


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turn whatever Orbax raises into a ValueError that names the checkpoint; nothing is under way any more then."""
    try:
        with _patient_loops():
            yield
    except Exception as error:  # orbax and tensorstore have no common type of their errors
        raise ValueError(f"{path}: {what} cannot be restored ({_said(error)}): copy or convert it again") from error


@contextmanager
def saving() -> Iterator[None]:
    """Let Orbax save in the block; OSError for whatever it raises. Ctrl-C waits for its end, as its threads do not.

    They would write on into a folder that is removed, and an event loop does not bear a KeyboardInterrupt.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(_is_of_use)
    told = "Orbax ends what it writes, then all of it is removed; Ctrl-C again leaves at once"
    try:
        with held_interrupts(told=told), _patient_loops():
            yield
    except Exception as error:
        raise OSError(f"Orbax says: {_said(error)}") from error
    finally:
        logger.removeFilter(_is_of_use)


def _said(error: Exception) -> str:
    """Return what went wrong in a line, without the settings that tensorstore adds."""
    return " ".join(str(error).split("[tensorstore_spec=")[0].split())[:400]


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in OF_NO_USE)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for its tasks before it closes.

    Orbax closes its loop at the first task that fails. The others go on in threads of tensorstore: they write into a
    folder that may be removed by then, and each prints a traceback, because the loop that it reports to is closed.
    """

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            with held_interrupts():
                tasks = [task for task in asyncio.all_tasks(self) if not task.done()]
                if tasks:
                    self.run_until_complete(asyncio.wait(tasks, timeout=LONGEST_WAIT_S))
                    for task in tasks:
                        if task.done() and not task.cancelled():
                            task.exception()  # is known: the first one was raised
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    """Whatever the policy before does, but for new loops."""

    def __init__(self, before: asyncio.AbstractEventLoopPolicy) -> None:
        super().__init__()
        self._before = before

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        return self._before.get_event_loop()

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._before.set_event_loop(loop)

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextmanager
def _patient_loops() -> Iterator[None]:
    """Let event loops that are made in the block wait for their tasks when they are closed."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientLoops(before))
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
