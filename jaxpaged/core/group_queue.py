"""Groups in their order: who comes first, and who is the first to be preempted."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from jaxpaged.core.request import SequenceGroup

Order = Callable[[SequenceGroup], Any]
"""Sort key of a group; smaller runs earlier. It must not change while the group lives."""
LONGEST_RUN = 512
"""Groups that lie in one piece; where one enters or leaves, no more than these move."""


def first_come_first_served(group: SequenceGroup) -> tuple[float, int]:
    return (group.request.arrival_time_s, group.request.arrival_index)


def by_priority(group: SequenceGroup) -> tuple[int, float, int]:
    """Lower priority numbers first, then first come, first served."""
    return (group.request.priority, group.request.arrival_time_s, group.request.arrival_index)


class GroupQueue:
    """Groups sorted by an order, in runs, so that a long queue costs what a short one does."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._runs: list[list[SequenceGroup]] = []
        """None is empty."""
        self._num_groups = 0

    def __len__(self) -> int:
        return self._num_groups

    def __iter__(self) -> Iterator[SequenceGroup]:
        """In order. The last groups may be popped meanwhile: the iteration then ends before them."""
        return chain.from_iterable(self._runs)

    @property
    def first(self) -> SequenceGroup:
        return self._runs[0][0]

    def add(self, group: SequenceGroup) -> None:
        """Into its place, behind those that tie with it."""
        self._num_groups += 1
        if not self._runs:
            self._runs.append([group])
            return
        # the first run with somebody behind the group, or the last one
        index = min(bisect_right(self._runs, self._order(group), key=self._last), len(self._runs) - 1)
        run = self._runs[index]
        insort(run, group, key=self._order)
        if len(run) > LONGEST_RUN:
            half = len(run) // 2
            self._runs[index : index + 1] = [run[:half], run[half:]]

    def remove(self, group: SequenceGroup) -> None:
        index = bisect_left(self._runs, self._order(group), key=self._last)
        run = self._runs[index]
        place = bisect_left(run, self._order(group), key=self._order)
        while run[place] is not group:  # groups that tie stand together, maybe in several runs
            place += 1
            if place == len(run):
                index, place = index + 1, 0
                run = self._runs[index]
        self._num_groups -= 1
        del run[place]
        if not run:
            del self._runs[index]

    def pop_last(self) -> SequenceGroup:
        run = self._runs[-1]
        group = run.pop()
        self._num_groups -= 1
        if not run:
            del self._runs[-1]
        return group

    def _last(self, run: list[SequenceGroup]) -> Any:
        return self._order(run[-1])
