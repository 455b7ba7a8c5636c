"""Blocks between device and host: any number, in any order, to the bit, through either pool."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.core.scheduler_output import BlockCopy
from jaxpaged.runner import swap
from jaxpaged.runner.host_pool import MAX_WAITING, NumpyPool, PinnedPool, host_pool
from jaxpaged.runner.swap import STAGING_SIZES, BlockMover, SwapError

both_pools = pytest.mark.parametrize("is_pinned", [False, True], ids=["numpy", "pinned"])
is_committed = pytest.mark.parametrize("is_committed", [False, True], ids=["anywhere", "committed"])


def cache(num_blocks, is_committed=False):
    """Three leaves of two kinds, with NaN among the bits."""
    rng = np.random.default_rng(0)
    kv = (
        jnp.asarray(rng.integers(0, 2**16, (num_blocks, 3, 4)), jnp.uint16),
        jnp.asarray(np.where(rng.random((num_blocks, 5)) < 0.2, np.nan, rng.standard_normal((num_blocks, 5))), "f4"),
        jnp.asarray(rng.integers(0, 2**16, (num_blocks, 3, 4)), jnp.uint16),
    )
    return jax.device_put(kv, jax.devices()[0]) if is_committed else kv


@both_pools
@is_committed
@pytest.mark.parametrize("count", [1, 5, 64, 150])
def test_blocks_come_back_as_they_went(count, is_pinned, is_committed):
    num_blocks = count + 1
    kv = cache(num_blocks, is_committed)
    before = [np.asarray(leaf).copy() for leaf in kv]
    mover = BlockMover(kv, 2 * num_blocks, is_pinned=is_pinned)
    order = np.random.default_rng(1).permutation(count) + 1
    mover.swap_out(kv, [BlockCopy(int(block), int(block) + count) for block in order])
    kv = jax.tree.map(jnp.zeros_like, kv)
    kv = mover.swap_in(kv, [BlockCopy(int(block) + count, int(block)) for block in order[::-1]])
    for old, new in zip(before, kv, strict=True):
        np.testing.assert_array_equal(old[1:].view(np.uint8), np.asarray(new)[1:].view(np.uint8))


@both_pools
def test_a_host_block_that_is_used_again_holds_what_came_last(is_pinned):
    kv = cache(4)
    mover = BlockMover(kv, 3, is_pinned=is_pinned)
    mover.swap_out(kv, [BlockCopy(1, 1)])
    mover.swap_out(kv, [BlockCopy(2, 1)])
    expected = np.asarray(kv[1][2]).copy()
    np.testing.assert_array_equal(np.asarray(mover.swap_in(kv, [BlockCopy(1, 3)])[1][3]), expected)


@both_pools
def test_what_left_does_not_change_with_the_cache(is_pinned):
    kv = cache(40)
    expected = np.asarray(kv[0]).copy()
    mover = BlockMover(kv, 40, is_pinned=is_pinned)
    for block in range(1, 3 * MAX_WAITING):  # the cache is donated while copies are on their way
        mover.swap_out(kv, [BlockCopy(block, block)])
        kv = mover.copy(kv, [BlockCopy(39, block)])
    mover.finish()
    kv = mover.swap_in(kv, [BlockCopy(block, block) for block in range(1, 3 * MAX_WAITING)])
    np.testing.assert_array_equal(np.asarray(kv[0])[1:], expected[1:])


def test_a_pinned_block_lies_in_pinned_memory_and_padding_takes_none():
    kv = cache(9)
    mover = BlockMover(kv, 9, is_pinned=True)
    mover.swap_out(kv, [BlockCopy(block, block) for block in range(1, 6)])  # staged as 16
    pool = mover._host
    assert isinstance(pool, PinnedPool)
    assert sorted(pool._host) == [1, 2, 3, 4, 5]
    blocks = jax.tree.leaves(pool._host)
    assert {array.sharding.memory_kind for array in blocks} == {"pinned_host"}
    assert sum(array.nbytes for array in blocks) == 5 * sum(leaf.nbytes // 9 for leaf in kv)
    kv = mover.swap_in(kv, [BlockCopy(2, 7)])
    assert {leaf.sharding.memory_kind for leaf in kv} == {"device"}


def test_a_cpu_has_no_use_for_pinned_memory():
    assert isinstance(host_pool(cache(2), 2), NumpyPool)


def test_copies_within_the_device_leave_the_others_alone():
    kv = cache(200)
    before = np.asarray(kv[0]).copy()
    mover = BlockMover(kv, 1)
    after = np.asarray(mover.copy(kv, [BlockCopy(i, i + 100) for i in range(1, 80)])[0])
    np.testing.assert_array_equal(after[101:180], before[1:80])
    np.testing.assert_array_equal(after[1:101], before[1:101])


@both_pools
def test_a_failing_copy_is_named_and_leaves_no_half_of_it(monkeypatch, is_pinned):
    kv = cache(200)
    mover = BlockMover(kv, 200, is_pinned=is_pinned)
    mover.swap_out(kv, [BlockCopy(9, 9)])
    gather, calls = mover._gather, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("injected")
        return gather(*arguments)

    monkeypatch.setattr(mover, "_gather", broken)
    with pytest.raises(SwapError, match=r"swap out of 100 blocks failed: injected"):
        mover.swap_out(kv, [BlockCopy(block, block + 50) for block in range(1, 101)])
    monkeypatch.undo()
    with pytest.raises(SwapError, match="host block 51 holds nothing"):
        mover.swap_in(kv, [BlockCopy(51, 1)])
    before = np.asarray(kv[0]).copy()
    kv = mover.swap_in(kv, [BlockCopy(9, 10)])  # what had left before is there, and the cache was not lost
    np.testing.assert_array_equal(np.asarray(kv[0])[10], before[9])
    mover.swap_out(kv, [BlockCopy(1, 51)])
    np.testing.assert_array_equal(np.asarray(mover.swap_in(kv, [BlockCopy(51, 2)])[0])[2], before[1])


def test_a_copy_that_fails_on_its_way_shows_when_its_block_is_wanted(monkeypatch):
    kv = cache(8)
    mover = BlockMover(kv, 8, is_pinned=False)
    mover.swap_out(kv, [BlockCopy(1, 1)])
    mover.swap_out(kv, [BlockCopy(2, 2)])
    pool = mover._host
    assert isinstance(pool, NumpyPool)

    class Failed:
        def __array__(self, *arguments, **options):
            raise RuntimeError("injected")

    pool._waiting[0] = (pool._waiting[0][0], (Failed(),) * 3)
    expected = np.asarray(kv[0])[2].copy()
    kv = mover.swap_in(kv, [BlockCopy(2, 5)])  # not the one that failed
    np.testing.assert_array_equal(np.asarray(kv[0])[5], expected)
    with pytest.raises(SwapError, match="host block 1 holds nothing"):
        mover.swap_in(kv, [BlockCopy(1, 5)])


@both_pools
@is_committed
def test_warm_up_compiles_every_size_and_writes_nothing(is_pinned, is_committed):
    kv = cache(4, is_committed)
    before = [np.asarray(leaf).copy() for leaf in kv]
    mover = BlockMover(kv, 4, is_pinned=is_pinned)
    kv = mover.warm_up(kv)
    for old, new in zip(before, kv, strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
        assert new.committed == is_committed, "or the next step is compiled anew"
    compiled = [copy._cache_size() for copy in (mover._gather, mover._scatter, mover._copy)]
    for count in (1, 3, 4, 7, 16, 40, *STAGING_SIZES, 100):
        mover.swap_out(kv, [BlockCopy(1, 1)] * count)
        kv = mover.swap_in(kv, [BlockCopy(1, 2), *[BlockCopy(1, 0)] * (count - 1)])
        kv = mover.copy(kv, [BlockCopy(2, 3), *[BlockCopy(0, 0)] * (count - 1)])
    assert [copy._cache_size() for copy in (mover._gather, mover._scatter, mover._copy)] == compiled


def test_staging_takes_little_of_the_device(monkeypatch):
    kv = cache(4)
    block_bytes = sum(leaf.nbytes // 4 for leaf in kv)
    monkeypatch.setattr(swap, "STAGING_BYTES", 20 * block_bytes)
    assert BlockMover(kv, 4).staging_sizes == (4, 16)
    monkeypatch.setattr(swap, "STAGING_BYTES", 1)
    assert BlockMover(kv, 4).staging_sizes == (4,)


def test_two_threads_at_once_are_an_error(monkeypatch):
    kv = cache(4)
    mover = BlockMover(kv, 4)
    inside, done = threading.Event(), threading.Event()

    def slow(*arguments):
        inside.set()
        assert done.wait(30)
        raise RuntimeError("injected")

    monkeypatch.setattr(mover, "_gather", slow)
    failures = []

    def first():
        try:
            mover.swap_out(kv, [BlockCopy(1, 1)])
        except SwapError as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    try:
        for call in (mover.swap_out, mover.swap_in, mover.copy):
            with pytest.raises(ValueError, match="one thread own the engine"):
                call(kv, [BlockCopy(1, 1)])
    finally:
        done.set()
        thread.join()
    assert len(failures) == 1
    kv = mover.copy(kv, [BlockCopy(1, 2)])  # and it is free again, for any thread
    np.testing.assert_array_equal(np.asarray(kv[0])[2], np.asarray(kv[0])[1])
