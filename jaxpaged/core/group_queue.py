"""Groups in their order: who comes first, and who is the first to be preempted."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.core.request import SequenceGroup

Order = Callable[[SequenceGroup], Any]
"""Sort key of a group; smaller runs earlier. It must not change while the group lives."""


def first_come_first_served(group: SequenceGroup) -> tuple[float, int]:
    return (group.request.arrival_time_s, group.request.arrival_index)


def by_priority(group: SequenceGroup) -> tuple[int, float, int]:
    """Lower priority numbers first, then first come, first served."""
    return (group.request.priority, group.request.arrival_time_s, group.request.arrival_index)


class GroupQueue:
    """Groups sorted by an order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._groups: list[SequenceGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._groups)

    def __getitem__(self, index: int) -> SequenceGroup:
        return self._groups[index]

    def add(self, group: SequenceGroup) -> None:
        insort(self._groups, group, key=self._order)

    def remove(self, group: SequenceGroup) -> None:
        index = bisect_left(self._groups, self._order(group), key=self._order)
        while self._groups[index] is not group:  # groups that tie stand together
            index += 1
        del self._groups[index]

    def pop_last(self) -> SequenceGroup:
        return self._groups.pop()
