"""Blocks between device and host: any number, in any order, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.core.scheduler_output import BlockCopy
from jaxpaged.runner.swap import STAGING_SIZES, BlockMover, SwapError


def cache(num_blocks):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(0, 2**16, (num_blocks, 3, 4)), jnp.uint16),
        jnp.asarray(rng.standard_normal((num_blocks, 5)), jnp.float32),
    )


@pytest.mark.parametrize("count", [1, 4, 5, 64, 65, 150])
def test_blocks_come_back_as_they_went(count):
    num_blocks = count + 1
    kv = cache(num_blocks)
    before = [np.asarray(leaf).copy() for leaf in kv]
    mover = BlockMover(kv, 2 * num_blocks)
    order = np.random.default_rng(1).permutation(count) + 1
    mover.swap_out(kv, [BlockCopy(int(block), int(block) + count) for block in order])
    kv = jax.tree.map(jnp.zeros_like, kv)
    kv = mover.swap_in(kv, [BlockCopy(int(block) + count, int(block)) for block in order[::-1]])
    for old, new in zip(before, kv, strict=True):
        np.testing.assert_array_equal(old[1:], np.asarray(new)[1:])


def test_a_host_block_that_is_used_again_holds_what_came_last():
    kv = cache(4)
    mover = BlockMover(kv, 3)
    mover.swap_out(kv, [BlockCopy(1, 1)])
    mover.swap_out(kv, [BlockCopy(2, 1)])
    expected = np.asarray(kv[1][2]).copy()
    assert np.array_equal(np.asarray(mover.swap_in(kv, [BlockCopy(1, 3)])[1][3]), expected)


def test_copies_within_the_device_leave_the_others_alone():
    kv = cache(200)
    before = np.asarray(kv[0]).copy()
    mover = BlockMover(kv, 1)
    after = np.asarray(mover.copy(kv, [BlockCopy(i, i + 100) for i in range(1, 80)])[0])
    np.testing.assert_array_equal(after[101:180], before[1:80])
    np.testing.assert_array_equal(after[1:101], before[1:101])


def test_a_failing_copy_is_named_and_leaves_no_half_of_it(monkeypatch):
    kv = cache(4)
    mover = BlockMover(kv, 4)

    def broken(*arguments):
        raise RuntimeError("injected")

    monkeypatch.setattr(mover, "_gather", broken)
    with pytest.raises(SwapError, match=r"swap out of 1 blocks failed: injected"):
        mover.swap_out(kv, [BlockCopy(1, 1)])
    assert not mover._waiting


def test_warm_up_compiles_every_size():
    mover = BlockMover(cache(4), 4)
    kv = mover.warm_up(cache(4))
    compiled = [copy._cache_size() for copy in (mover._gather, mover._scatter, mover._copy)]
    for count in (1, 3, 4, 7, 16, 40, *STAGING_SIZES, 100):
        mover.swap_out(kv, [BlockCopy(1, 1)] * count)
        kv = mover.copy(mover.swap_in(kv, [BlockCopy(1, 2)] * count), [BlockCopy(2, 3)] * count)
    assert [copy._cache_size() for copy in (mover._gather, mover._scatter, mover._copy)] == compiled
