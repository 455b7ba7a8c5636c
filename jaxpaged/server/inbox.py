"""What the event loop asks of the engine's thread, in order, through one lock."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.sampling_params import BeamSearchParams, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One prompt for the engine."""

    request_id: str
    prompt: Mapping[str, Any]
    params: SamplingParams | BeamSearchParams
    priority: int
    is_streamed: bool
    submitted_s: float
    """time.monotonic"""


@dataclass(frozen=True)
class Orders:
    """What came since the last time."""

    submissions: tuple[Submission, ...]
    aborted_ids: tuple[str, ...]
    is_to_stop: bool


class Inbox:
    """A bounded queue of submissions; aborts and the order to stop always find room."""

    def __init__(self, max_submissions: int) -> None:
        self._max_submissions = max_submissions
        self._condition = threading.Condition()
        self._submissions: list[Submission] = []
        self._aborted_ids: list[str] = []
        self._is_to_stop = False

    def submit(self, submissions: list[Submission]) -> bool:
        """All or none; False if they find no room."""
        with self._condition:
            if len(self._submissions) + len(submissions) > self._max_submissions:
                return False
            self._submissions.extend(submissions)
            self._condition.notify()
            return True

    def abort(self, request_ids: tuple[str, ...]) -> None:
        with self._condition:
            self._aborted_ids.extend(request_ids)
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._is_to_stop = True
            self._condition.notify()

    def take(self, *, is_waiting: bool) -> Orders:
        """Everything there is; `is_waiting` until there is something."""
        with self._condition:
            while is_waiting and not (self._submissions or self._aborted_ids or self._is_to_stop):
                self._condition.wait()
            orders = Orders(tuple(self._submissions), tuple(self._aborted_ids), self._is_to_stop)
            self._submissions.clear()
            self._aborted_ids.clear()
            return orders
