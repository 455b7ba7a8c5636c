import random

from core.fake_runner import make_request

from jaxpaged.core.group_queue import LONGEST_RUN, GroupQueue, by_priority, first_come_first_served
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
        assert queue.first is expected[0]


def test_groups_that_tie_are_removed_by_identity():
    first, second = make_group("a"), make_group("b")
    queue = GroupQueue(lambda group: 0)
    queue.add(first)
    queue.add(second)
    queue.remove(second)
    assert list(queue) == [first]


def test_a_queue_of_many_runs_is_sorted_whatever_enters_and_leaves():
    rng = random.Random(0)
    queue = GroupQueue(by_priority)
    groups = [make_group(str(index), arrival_index=index, priority=rng.randrange(9)) for index in range(4000)]
    for group in groups:
        queue.add(group)
    leaving = rng.sample(groups, 3500)
    for group in leaving:
        queue.remove(group)
    stay = sorted(set(groups) - set(leaving), key=by_priority)
    assert list(queue) == stay
    assert queue.first is stay[0]
    assert [queue.pop_last() for _ in range(len(queue))] == stay[::-1]
    assert not queue


def test_groups_that_tie_stay_in_the_order_of_adding_over_many_runs():
    groups = [make_group(str(index)) for index in range(3 * LONGEST_RUN)]
    queue = GroupQueue(lambda group: 0)
    for group in groups:
        queue.add(group)
    assert list(queue) == groups
    queue.remove(groups[-1])
    queue.remove(groups[LONGEST_RUN])
    assert list(queue) == groups[:LONGEST_RUN] + groups[LONGEST_RUN + 1 : -1]


def test_popping_the_last_ends_an_iteration_that_has_not_come_there():
    groups = [make_group(str(index), arrival_index=index) for index in range(2 * LONGEST_RUN)]
    queue = GroupQueue(first_come_first_served)
    for group in groups:
        queue.add(group)
    seen = []
    for group in queue:
        seen.append(group)
        queue.pop_last()
    assert seen == groups[:LONGEST_RUN]
