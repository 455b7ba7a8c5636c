import pytest

from jaxpaged.core.block_pool import BlockPool


def test_the_null_block_is_never_given_out():
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(3)] == [1, 2, 3]
    assert (pool.num_free, pool.num_referenced, pool.num_usable) == (0, 3, 3)
    with pytest.raises(ValueError, match="all 3 blocks"):
        pool.allocate()
    with pytest.raises(ValueError, match="null block cannot be held"):
        pool.share(0)


def test_the_block_free_the_longest_is_taken_first():
    pool = BlockPool(4)
    for _ in range(3):
        pool.allocate()
    for block in (2, 3, 1):
        pool.release(block)
    assert [pool.allocate() for _ in range(3)] == [2, 3, 1]


def test_sharing_a_free_block_takes_it_off_the_free_list():
    pool = BlockPool(4)
    pool.share(2)
    assert [pool.allocate(), pool.allocate()] == [1, 3]
    pool.check({1: 1, 2: 1, 3: 1})


def test_a_block_is_free_only_after_its_last_reference():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    assert pool.num_shared == 1
    pool.release(block)
    assert (pool.num_free, pool.num_shared) == (0, 0)
    pool.release(block)
    assert pool.num_free == 1
    with pytest.raises(ValueError, match="no reference"):
        pool.release(block)


def test_the_audit_names_a_block_nobody_holds():
    pool = BlockPool(3)
    pool.allocate()
    with pytest.raises(RuntimeError, match="block 1 has count 1, but 0 tables"):
        pool.check({})


def test_a_pool_without_a_null_block_is_refused():
    with pytest.raises(ValueError, match="num_blocks=0"):
        BlockPool(0)


def test_the_audit_names_the_break_of_a_free_list():
    pool = BlockPool(5)
    pool._next[2] = 4
    with pytest.raises(RuntimeError, match="free list is broken behind block 2"):
        pool.check({})


def test_any_free_block_may_be_shared_and_the_others_keep_their_order():
    pool = BlockPool(8)
    for block in (1, 4, 7):  # both ends and the middle
        pool.share(block)
    pool.release(4)
    pool.check({1: 1, 7: 1})
    assert [pool.allocate() for _ in range(5)] == [2, 3, 5, 6, 4]
