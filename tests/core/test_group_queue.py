from core.fake_runner import make_request

from jaxpaged.core.group_queue import GroupQueue, by_priority, first_come_first_served
from jaxpaged.core.request import SequenceGroup


def make_group(name, **options):
    return SequenceGroup(make_request(name, [1], **options), [])


def test_the_order_decides_not_the_time_of_adding():
    late = make_group("late", arrival_time_s=2.0, arrival_index=0, priority=-1)
    early = make_group("early", arrival_time_s=1.0, arrival_index=1)
    tie = make_group("tie", arrival_time_s=1.0, arrival_index=2)
    for order, expected in ((first_come_first_served, [early, tie, late]), (by_priority, [late, early, tie])):
        queue = GroupQueue(order)
        for group in (late, tie, early):
            queue.add(group)
        assert list(queue) == expected
        queue.remove(expected[1])
        assert queue.pop_last() is expected[2]
        assert queue[0] is expected[0]


def test_groups_that_tie_are_removed_by_identity():
    first, second = make_group("a"), make_group("b")
    queue = GroupQueue(lambda group: 0)
    queue.add(first)
    queue.add(second)
    queue.remove(second)
    assert list(queue) == [first]
