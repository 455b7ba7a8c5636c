"""The TPU kernel that writes a step's keys and values: it writes its slots and no byte beside them, and is done before
anything is read."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TOLERANCES, tpu_interpreter

from pallas_kernels import KVLayout, make_metadata, paged_attention
from pallas_kernels.paged_attention.mosaic_tpu_write import PROGRAM_TOKENS, run_lens, write_rows

interpreted = pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU is here: nothing is interpreted")
each_order_of_copies = pytest.mark.parametrize("dma_execution_mode", ["on_wait", "eager"])


def test_a_copy_brings_neighbours_of_one_tile_of_8_slots() -> None:
    # a block of 8: slots 13 to 15 end their tile, 16 and 17 begin the next; 40 to 47 are a whole tile, 48 is behind it;
    # slot 7 is in the null block; 100 and 102 are no neighbours
    slots = [13, 14, 15, 16, 17, *range(40, 49), 7, 100, 102, 0]
    expected = [3, 2, 1, 2, 1, 8, 7, 6, 5, 4, 3, 2, 1, 1, 0, 1, 1, 0]
    assert run_lens(jnp.array(slots, jnp.int32), 8).tolist() == expected


def test_a_copy_is_of_one_program() -> None:
    # token 124 stands in slot 136, the first of a tile; tokens 128 to 131, in its second half, are of the next program
    lens = run_lens(jnp.arange(12, 12 + 2 * PROGRAM_TOKENS, dtype=jnp.int32), 8)
    assert PROGRAM_TOKENS == 128
    assert lens[jnp.array([0, 4, 124, 128, 132])].tolist() == [4, 8, 4, 4, 8]


SLOTS = {
    "a chunk that begins and ends inside tiles": range(29, 45),
    "two sequences in neighbouring blocks": [47, 48],
    "two sequences in one tile, apart in the batch": [20, 100, 21, 19],
    "decodes that open blocks, or end them": [16, 63, 48, 31, 80],
    "a chunk of whole tiles": range(32, 64),
    "more tokens than a program has": range(21, 21 + 2 * PROGRAM_TOKENS + 9),
    "tokens of the null block": [0, 0, 17, 3, 18, 0],
    "no token": [],
}


@interpreted
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize(("dma_execution_mode", "num_parts"), [("on_wait", 1), ("eager", 2)])
def test_slots_are_written_and_nothing_beside_them(slots: Any, dma_execution_mode: str, num_parts: int) -> None:
    block_size, num_lanes, num_blocks, num_padding = 16, 256, 20, 3
    random = np.random.default_rng(0)
    parts = () if num_parts == 1 else (num_parts,)
    before = random.integers(0, 2**32, (num_blocks, *parts, block_size, num_lanes), np.uint32)
    rows = random.integers(0, 2**32, (len(slots) + num_padding, num_parts, num_lanes), np.uint32)
    expected = before.copy()
    for row, slot in zip(rows, slots, strict=False):
        if slot >= block_size:
            expected[slot // block_size, ..., slot % block_size, :] = row.reshape(*parts, num_lanes)
    with tpu_interpreter(dma_execution_mode):
        mapping = jnp.array([*slots, *[0] * num_padding], jnp.int32)
        written = np.asarray(write_rows(jnp.array(before), jnp.array(rows), mapping, jnp.int32(len(slots))))
    np.testing.assert_array_equal(written, expected)


@interpreted
@each_order_of_copies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_reads_what_another_one_writes_in_the_same_step(dma_execution_mode: str, dtype: str) -> None:
    """A decode and a chunk share the blocks of a prompt that is written with them, behind them in the batch or before.

    All slots are NaN before the step: whoever reads before the last copy has arrived reads that.
    """
    block_size, num_blocks = 16, 7
    tables = np.array([[1, 2, 4], [1, 2, 3], [1, 2, 5]], np.int32)
    metadata = make_metadata(
        block_tables=tables, context_lens=[33, 40, 37], query_lens=[1, 40, 5], block_size=block_size, num_tokens=48,
        tile_size=16, key_chunk_tokens=32,
    )  # fmt: skip
    random = np.random.default_rng(0)
    arrays = [jnp.array(random.standard_normal((48, heads, 64)), jnp.dtype(dtype)) for heads in (4, 2, 2)]
    nothing = np.full((num_blocks, block_size, 2, 64), np.nan, np.float32)

    def attend(name: str) -> np.ndarray:
        layout = KVLayout(num_kv_heads=2, head_dim=64, block_size=block_size, dtype=dtype, implementation=name)
        run = jax.jit(partial(paged_attention, scale=0.125, implementation=name))
        return np.asarray(run(*arrays, layout.pack(nothing, nothing), metadata)[0].astype(jnp.float32))

    with tpu_interpreter(dma_execution_mode):
        output = attend("mosaic_tpu")
    expected = attend("reference")
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(output, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
