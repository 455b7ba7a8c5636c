from array import array

import pytest
from core.fake_runner import make_request

from jaxpaged.core.block_manager import BlockManager
from jaxpaged.core.request import TOKEN_TYPE, Sequence, SequenceGroup, SequenceStatus
from jaxpaged.core.scheduler_output import ScheduledSequence


def make_manager(num_device_blocks=10, num_host_blocks=10, **options):
    return BlockManager(num_device_blocks=num_device_blocks, num_host_blocks=num_host_blocks, block_size=4, **options)


def running(sequence_id, tokens, **options):
    request = make_request(f"r{sequence_id}", tokens, **options)
    return Sequence(sequence_id, request, 0, array(TOKEN_TYPE, tokens), status=SequenceStatus.RUNNING)


def compute(manager, sequence, num_tokens):
    """The sequence's next tokens are scheduled; return the copies."""
    start = sequence.num_computed_tokens
    num_blocks = manager.num_blocks_to_append([ScheduledSequence(sequence, start, num_tokens, 0)])
    num_free = manager.num_free_blocks
    copies = manager.append(sequence, start, num_tokens)
    assert num_free - manager.num_free_blocks == num_blocks
    sequence.num_computed_tokens += num_tokens
    return list(copies)


def test_a_table_grows_by_whole_blocks_as_tokens_come():
    manager = make_manager()
    sequence = running(0, range(9))
    assert compute(manager, sequence, 4) == []
    assert sequence.block_ids == [1]
    compute(manager, sequence, 1)
    compute(manager, sequence, 3)
    assert sequence.block_ids == [1, 2]
    compute(manager, sequence, 1)
    assert sequence.block_ids == [1, 2, 3]
    manager.check([SequenceGroup(sequence.request, [sequence])])


def test_a_fork_shares_blocks_and_the_first_write_copies_only_the_last():
    manager = make_manager()
    parent, child = running(0, range(6)), running(1, range(6))
    compute(manager, parent, 6)
    manager.fork(parent, child)
    child.num_computed_tokens = 6
    assert child.block_ids == [1, 2]
    assert manager.num_saved_blocks == 2
    both = [ScheduledSequence(parent, 6, 1, 1), ScheduledSequence(child, 6, 1, 1)]
    assert manager.num_blocks_to_append(both) == 1  # the second writer finds the block its own
    assert compute(manager, parent, 1) == [(2, 3)]
    assert compute(manager, child, 1) == []
    assert (parent.block_ids, child.block_ids) == ([1, 3], [1, 2])
    manager.record_step()
    assert manager.blocks_saved_fraction == pytest.approx(1 - 3 / 4)
    assert manager.num_copied_blocks == 1


def test_a_prompt_is_matched_by_whole_blocks_with_one_token_left_to_compute():
    manager = make_manager()
    first = running(0, range(8))
    compute(manager, first, 8)
    assert manager.match(running(1, range(8))) == []  # not committed yet
    manager.commit(first, 8)
    assert manager.match(running(2, range(8))) == [1]  # 7 tokens at most
    assert manager.match(running(3, range(9))) == [1, 2]
    assert manager.match(running(4, [0, 1, 2, 3, 9, 9, 9, 9, 9])) == [1]
    assert manager.match(running(5, range(9), cache_salt="tenant")) == []
    assert make_manager(enable_prefix_caching=False).match(first) == []


def test_only_full_blocks_of_known_tokens_are_committed():
    manager = make_manager()
    sequence = running(0, range(7))
    sequence.num_pending_tokens = 1
    compute(manager, sequence, 8)  # the eighth is on the device only
    manager.commit(sequence, 8)
    assert manager.match(running(1, range(20))) == [1]
    sequence.token_ids.append(7)
    manager.commit(sequence, 8)
    assert manager.match(running(2, range(20))) == [1, 2]


def test_a_freed_block_is_found_until_it_is_taken_tail_first():
    manager = make_manager(num_device_blocks=4)
    sequence = running(0, range(12))
    compute(manager, sequence, 12)
    manager.commit(sequence, 12)
    manager.retire(sequence)
    assert manager.num_free_blocks == 3
    assert manager.match(running(1, range(13))) == [1, 2, 3]
    other = running(2, [9, 9])
    compute(manager, other, 2)
    assert other.block_ids == [3]  # the end of a prefix goes before its beginning
    follower = running(3, range(13))
    match = manager.match(follower)
    assert match == [1, 2]
    assert manager.num_blocks_to_start(match, 12, 99) == 3  # two found ones are free and count as much as new ones
    manager.device.share(match[0])
    assert manager.num_blocks_to_start(match, 12, 99) == 2
    manager.device.release(match[0])
    manager.allocate(follower, match)
    assert manager.num_free_blocks == 0


def test_discarded_blocks_are_not_found_wherever_the_table_is():
    manager = make_manager()
    sequence = running(0, range(8))
    compute(manager, sequence, 8)
    manager.commit(sequence, 8)
    manager.free(sequence)  # to be recomputed, and its logits turn out not finite
    manager.discard(sequence)
    assert manager.match(running(1, range(9))) == []


def test_swapping_copies_a_shared_block_once_and_keeps_the_sharing():
    manager = make_manager()
    parent, child = running(0, range(6)), running(1, range(6))
    compute(manager, parent, 6)
    manager.fork(parent, child)
    child.num_computed_tokens = 6
    group = SequenceGroup(parent.request, [parent, child])
    assert manager.swap_out(group) == [(1, 1), (2, 2)]
    parent.status = child.status = SequenceStatus.SWAPPED
    manager.check([group])
    assert manager.device.num_referenced == 0
    assert manager.host.num_referenced == 2
    assert manager.num_blocks_to_swap_in(group) == 2
    copies = manager.swap_in(group)
    parent.status = child.status = SequenceStatus.RUNNING
    assert [copy.source for copy in copies] == [1, 2]
    assert parent.block_ids == child.block_ids == [copy.target for copy in copies]
    manager.check([group])
    assert (manager.num_swapped_out_blocks, manager.num_swapped_in_blocks) == (2, 2)


def test_a_swap_in_takes_what_the_device_still_knows():
    manager = make_manager()
    sequence = running(0, range(10))
    compute(manager, sequence, 10)
    manager.commit(sequence, 10)
    group = SequenceGroup(sequence.request, [sequence])
    manager.swap_out(group)
    sequence.status = SequenceStatus.SWAPPED
    assert manager.num_blocks_to_swap_in(group) == 3  # found ones leave the free list too
    copies = manager.swap_in(group)
    sequence.status = SequenceStatus.RUNNING
    assert sequence.block_ids[:2] == [1, 2]
    assert copies == [(3, sequence.block_ids[2])]  # the block that is not full was copied
    manager.check([group])


def test_a_swap_in_never_takes_a_known_block_for_one_that_is_still_to_be_written():
    manager = make_manager()
    half, full = running(0, range(9)), running(1, range(9))
    compute(manager, full, 8)
    assert manager.match(half) == []  # hashes the whole prompt
    compute(manager, half, 6)
    manager.commit(full, 8)
    group = SequenceGroup(half.request, [half])
    manager.swap_out(group)
    half.status = SequenceStatus.SWAPPED
    copies = manager.swap_in(group)
    half.status = SequenceStatus.RUNNING
    assert half.block_ids[0] == full.block_ids[0]
    assert half.block_ids[1] != full.block_ids[1]
    assert len(copies) == 1


def test_a_full_host_pool_swaps_nothing():
    manager = make_manager(num_host_blocks=2)
    sequence = running(0, range(6))
    compute(manager, sequence, 6)
    group = SequenceGroup(sequence.request, [sequence])
    assert manager.swap_out(group) is None
    assert sequence.block_ids == [1, 2]
    manager.check([group])


def test_blocks_before_a_window_are_let_go_and_found_until_they_are_taken():
    manager = make_manager(num_device_blocks=9, windows=(None, 5))
    sequence = running(0, range(12))
    compute(manager, sequence, 12)
    assert sequence.block_ids == [1, 2, 3, 4, 5, 6]  # three columns of two blocks
    manager.leave(sequence, 11)  # it sees 7 to 11
    assert sequence.block_ids == [1, 0, 3, 4, 5, 6]
    manager.leave(sequence, 12)  # it sees 8 to 12
    assert sequence.block_ids == [1, 0, 3, 0, 5, 6]
    manager.leave(sequence, 12)
    group = SequenceGroup(sequence.request, [sequence])
    manager.check([group])
    assert (manager.num_distinct_blocks(group), manager.num_free_blocks) == (4, 4)
    assert manager.can_share_prefix(sequence, 3)
    assert not manager.can_share_prefix(sequence, 2)  # token 8 sees 4 to 8
    # committed as they were let go; 9 to 12 are known too, and were not
    assert manager.match(running(1, range(8))) == [1, 2]
    manager.commit(sequence, 12)
    # a table of 12 tokens sees 8 to 12 next, one of 8 tokens 4 to 8
    assert manager.match(running(2, range(13))) == [1, 0, 3, 0, 5, 6]
    assert manager.match(running(3, [*range(8), 99, 99])) == [1, 0, 3, 4]
    other = running(4, [50] * 9)
    compute(manager, other, 4)  # the two that were never used
    compute(manager, other, 4)  # 2 and 4
    assert other.block_ids[2:] == [2, 4]
    assert manager.match(running(3, [*range(8), 99, 99])) == []  # nor of 4 tokens, whose window is gone too


def test_a_match_is_the_longest_whose_windows_are_all_there():
    manager = make_manager(num_device_blocks=20, windows=(5,))
    sequence = running(0, range(16))
    compute(manager, sequence, 16)
    manager.commit(sequence, 16)
    assert manager.match(running(1, range(17))) == [0, 0, 0, 4]
    manager.prefix_cache.forget(4)
    assert manager.match(running(1, range(17))) == [0, 0, 3]
    manager.prefix_cache.forget(2)
    assert manager.match(running(1, range(17))) == [0, 0, 3]
    manager.prefix_cache.forget(3)
    assert manager.match(running(1, range(17))) == [1]
    assert manager.match(running(1, range(17)), 0) == []


def test_a_shared_column_is_copied_in_every_group():
    manager = make_manager(num_device_blocks=20, windows=(5, None))
    parent, child = running(0, range(10)), running(1, range(10))
    compute(manager, parent, 10)
    manager.leave(parent, 10)
    assert parent.block_ids == [0, 2, 3, 4, 5, 6]
    manager.fork(parent, child)
    child.num_computed_tokens = 10
    both = [ScheduledSequence(parent, 10, 1, 1), ScheduledSequence(child, 10, 1, 1)]
    assert manager.num_blocks_to_append(both) == 2
    copies = compute(manager, parent, 1)
    assert [copy.source for copy in copies] == [5, 6]
    assert parent.block_ids[4:] == [copy.target for copy in copies]
    assert compute(manager, child, 1) == []
    group = SequenceGroup(parent.request, [parent, child])
    manager.check([group])
    copies = manager.swap_out(group)
    assert [copy.source for copy in copies] == [2, 3, 4, 7, 8, 5, 6]  # what is held, a shared block once
    parent.status = child.status = SequenceStatus.SWAPPED
    manager.check([group])
    assert manager.num_blocks_to_swap_in(group) == 7
    manager.swap_in(group)
    parent.status = child.status = SequenceStatus.RUNNING
    manager.check([group])
    assert [parent.block_ids[0], child.block_ids[0]] == [0, 0]
    assert parent.block_ids[1:4] == child.block_ids[1:4]


def test_what_a_table_takes_to_start_is_bounded_by_its_windows():
    manager = make_manager(num_device_blocks=40, windows=(5, None))
    # 40 tokens, 10 columns; a window of 5 and steps of 3 touch 3 columns
    assert manager.num_blocks_to_start([], 40, 3) == 3 + 10
    # two free columns that were found count as much as new ones, what was let go does not
    assert manager.num_blocks_to_start([0, 2, 3, 4], 40, 3) == 3 + 10
    assert manager.num_blocks_to_start([0, 2, 3, 4], 8, 3) == 1 + 2


@pytest.mark.parametrize("options", [{"num_device_blocks": 1}, {"num_host_blocks": -1}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        make_manager(**options)
