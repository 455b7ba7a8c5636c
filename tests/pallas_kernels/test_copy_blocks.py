"""Blocks are copied whole, all reads before all writes, and in place when donated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_blocks, gather_blocks, scatter_blocks


def cache(num_blocks: int = 6):
    """Two layers, one of two leaves; block b of a leaf holds 100 * leaf + b everywhere."""
    blocks = np.arange(num_blocks)[:, None, None]
    keys = jnp.asarray(np.broadcast_to(blocks, (num_blocks, 2, 3)).astype(np.float32))
    bits = jnp.asarray(np.broadcast_to(100 + blocks[..., 0], (num_blocks, 4)).astype(np.uint16))
    return ((keys, bits), keys + 200.0)


def ids(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def first_entries(kv) -> list[list[float]]:
    return [np.asarray(leaf).reshape(leaf.shape[0], -1)[:, 0].tolist() for leaf in jax.tree.leaves(kv)]


def test_copies_read_before_they_write_and_padding_is_harmless() -> None:
    # 1 -> 2 and 2 -> 3: block 3 gets the old 2; 4 -> 5 twice is one source for two targets of which one is padding
    copied = jax.jit(copy_blocks, donate_argnums=0)(cache(), ids(1, 2, 4, 0, 0), ids(2, 3, 5, 0, 0))
    expected = [0, 1, 1, 2, 4, 4]
    assert first_entries(copied) == [expected, [100 + b for b in expected], [200 + b for b in expected]]
    assert [leaf.dtype for leaf in jax.tree.leaves(copied)] == [jnp.float32, jnp.uint16, jnp.float32]


def test_one_block_may_be_copied_to_many() -> None:
    copied = copy_blocks(cache(), ids(1, 1, 1), ids(3, 4, 5))
    assert first_entries(copied)[0] == [0, 1, 2, 1, 1, 1]


def test_rows_of_the_null_block_and_wrong_ids_write_nothing() -> None:
    kv = cache()
    staged = jax.tree.map(lambda leaf: jnp.full_like(leaf, 9), gather_blocks(kv, ids(1, 1, 1, 1, 1)))
    written = scatter_blocks(kv, ids(0, 0, 3, -1, 6), staged)  # six blocks: -1 and 6 are none of them
    assert first_entries(written)[0] == [0, 1, 2, 9, 4, 5]


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_many_copies_of_any_dtype_at_once(dtype: str) -> None:
    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.integers(0, 200, (300, 3, 8)), dtype)
    sources, targets = rng.permutation(299)[:200] + 1, rng.permutation(299)[:200] + 1  # they overlap
    expected = np.asarray(kv).copy()
    expected[targets] = np.asarray(kv)[sources]
    pad = np.zeros(56, np.int32)
    copied = jax.jit(copy_blocks, donate_argnums=0)(kv, np.r_[sources, pad], np.r_[targets, pad])
    np.testing.assert_array_equal(np.asarray(copied), expected)


def test_a_round_trip_through_staging_is_bit_exact_even_for_nan() -> None:
    kv = jax.tree.map(lambda leaf: leaf.at[4].set(jnp.array(jnp.nan, leaf.dtype) if leaf.dtype == jnp.float32 else 7),
                      cache())  # fmt: skip
    staged = jax.jit(gather_blocks)(kv, ids(4, 2, 0, 0))
    assert [leaf.shape[0] for leaf in jax.tree.leaves(staged)] == [4, 4, 4]
    wiped = jax.tree.map(lambda leaf: leaf.at[1:].set(jnp.array(9, leaf.dtype)), kv)
    back = jax.jit(scatter_blocks, donate_argnums=0)(wiped, ids(3, 5, 0, 0), staged)
    for old, new in zip(jax.tree.leaves(kv), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[3, 5]], np.asarray(old)[[4, 2]])
        assert (np.asarray(new)[[1, 2, 4]] == 9).all()


@pytest.mark.parametrize("name", ["copy", "scatter"])
def test_a_donated_cache_is_changed_in_place(name: str) -> None:
    kv = cache(num_blocks=211)
    if name == "copy":
        function, arguments = copy_blocks, (ids(1, 2), ids(3, 4))
    else:
        function, arguments = scatter_blocks, (ids(3, 4), gather_blocks(kv, ids(1, 2)))
    compiled = jax.jit(function, donate_argnums=0).lower(kv, *arguments).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 10
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kv)]
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(compiled(kv, *arguments))] == before


def test_staging_of_another_cache_is_refused() -> None:
    kv = cache()
    with pytest.raises(ValueError, match="stage them with gather_blocks"):
        scatter_blocks(kv, ids(1), gather_blocks(kv[0], ids(1)))
    with pytest.raises(ValueError, match="2 blocks of this cache"):
        scatter_blocks(kv, ids(1, 2), gather_blocks(kv, ids(1)))
    with pytest.raises(ValueError, match="pad both with 0"):
        copy_blocks(kv, ids(1, 2), ids(3))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([1, 2], "is a list"),
        (np.array([1, 2]), r"is int64\(2,\)"),
        (jnp.array([1.0, 2.0]), r"is float32\(2,\)"),
        (jnp.array([[1, 2]]), r"is int32\(1, 2\)"),
    ],
)
def test_ids_that_are_no_int32_array_of_one_axis_are_refused_by_name(wrong: object, told: str) -> None:
    kv, good = cache(), ids(1, 2)
    for name, call in (
        ("ids", lambda: gather_blocks(kv, wrong)),
        ("ids", lambda: scatter_blocks(kv, wrong, gather_blocks(kv, good))),
        ("sources", lambda: copy_blocks(kv, wrong, good)),
        ("targets", lambda: copy_blocks(kv, good, wrong)),
    ):
        with pytest.raises(ValueError, match=f"{name} {told}: it must be an int32 array of one axis"):
            call()
