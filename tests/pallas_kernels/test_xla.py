"""What the XLA implementation promises beyond being right: rows that do not depend on company, and updates in place."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KVLayout, make_metadata, paged_attention
from pallas_kernels.cases import HEAD_SHAPES, MIXED, BatchCase, make_batch

TILE_SIZE, KEY_CHUNK_TOKENS = 8, 64
NUM_TOKENS, NUM_SEQS, BLOCKS_OF_TOKENS = 96, 4, 192


class Story:
    """Sequences of known tokens, fed to the op in any schedule, at any block size, everything in tiles."""

    def __init__(self, dtype: str = "float32", window: int | None = None, heads: str = "smollm-135m") -> None:
        self.heads, self.dtype = HEAD_SHAPES[heads], dtype
        self.attend = jax.jit(
            partial(paged_attention, scale=self.heads.head_dim**-0.5, window=window, soft_cap=20.0), donate_argnums=3
        )

    def tokens(self, seed: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        heads = self.heads
        return tuple(
            random.standard_normal((length, count, heads.head_dim)).astype(np.float32)
            for count in (heads.num_q_heads, heads.num_kv_heads, heads.num_kv_heads)
        )

    def tell(self, seeds: list[int], length: int, steps: list[list[tuple[int, int]]], block_size: int) -> np.ndarray:
        """Outputs [sequence, token] of `seeds`; each step lists (row, new tokens) in the order of the batch."""
        heads = self.heads
        layout = KVLayout(
            num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, block_size=block_size, dtype=self.dtype
        )
        per_seq = BLOCKS_OF_TOKENS // block_size
        kv = layout.init(1 + NUM_SEQS * per_seq)
        tables = 1 + np.random.default_rng(7).permutation(NUM_SEQS * per_seq).reshape(NUM_SEQS, per_seq)
        stories = [self.tokens(seed, length) for seed in seeds]
        done = [0] * len(seeds)
        outputs = np.zeros((len(seeds), length, heads.num_q_heads, heads.head_dim), np.float32)
        for step in steps:
            rows, counts = [row for row, _ in step], [count for _, count in step]
            metadata = make_metadata(
                block_tables=tables[rows].astype(np.int32),
                context_lens=[done[row] + count for row, count in step],
                query_lens=counts,
                block_size=block_size,
                num_tokens=NUM_TOKENS,
                num_seqs=NUM_SEQS,
                tile_size=TILE_SIZE,
                key_chunk_tokens=KEY_CHUNK_TOKENS,
                has_decodes=False,
            )
            arrays = []
            for kind in range(3):
                parts = [stories[row][kind][done[row] : done[row] + count] for row, count in step]
                joined = np.concatenate(parts)
                padded = np.full((NUM_TOKENS, *joined.shape[1:]), np.nan, np.float32)
                padded[: len(joined)] = joined
                arrays.append(jnp.asarray(padded, jnp.dtype(self.dtype)))
            output, kv = self.attend(*arrays, kv, metadata)
            output = np.asarray(output.astype(jnp.float32))
            first = 0
            for row, count in step:
                outputs[row, done[row] : done[row] + count] = output[first : first + count]
                done[row] += count
                first += count
        assert done == [length] * len(seeds)
        return outputs


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 37)])
def test_a_token_in_tiles_is_bit_equal_in_any_row_company_chunking_and_block_size(
    dtype: str, window: int | None
) -> None:
    story, length = Story(dtype, window), 70
    alone = story.tell([1], length, [[(0, length)]], block_size=16)[0]
    assert np.isfinite(alone).all()
    assert alone.any()

    by_one = story.tell([1], length, [[(0, 1)]] * length, block_size=16)[0]
    np.testing.assert_array_equal(by_one, alone, err_msg="decoded one by one")

    chunks = [[(0, 13)], [(0, 1)], [(0, 30)], [(0, 7)], [(0, 19)]]
    for block_size in (8, 64):
        chunked = story.tell([1], length, chunks, block_size=block_size)[0]
        np.testing.assert_array_equal(chunked, alone, err_msg=f"in chunks, block size {block_size}")

    company = [[(2, 5), (0, 11), (1, 30)], [(1, 40), (0, 3)], [(0, 40), (2, 20)], [(2, 45), (0, 16)]]
    in_company = story.tell([1, 2, 3], length, company, block_size=16)[0]
    np.testing.assert_array_equal(in_company, alone, err_msg="in company")


def test_a_token_in_tiles_is_bit_equal_where_every_query_head_has_its_own_keys() -> None:
    story = Story(heads="opt-125m")
    alone = story.tell([1], 40, [[(0, 40)]], block_size=16)[0]
    other = story.tell([1, 2], 40, [[(1, 3), (0, 5)], [(0, 35), (1, 37)]], block_size=8)[0]
    np.testing.assert_array_equal(other, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_cache_is_updated_in_place(dtype: str) -> None:
    num_blocks = 997  # a number that no other axis has
    case = BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED, dtype=dtype)
    batch = make_batch(case, "xla")
    layout = KVLayout(num_kv_heads=4, head_dim=8, block_size=16, dtype=dtype, implementation="xla")

    def two_layers(kv, metadata):
        hidden = batch.query
        first, kv0 = paged_attention(hidden, batch.key, batch.value, kv[0], metadata, scale=1.0)
        second, kv1 = paged_attention(first, batch.key, batch.value, kv[1], metadata, scale=1.0)
        return second, (kv0, kv1)

    kv = (layout.init(num_blocks), layout.init(num_blocks))
    compiled = jax.jit(two_layers, donate_argnums=0).lower(kv, batch.metadata).compile()
    cache_bytes = 2 * num_blocks * layout.block_bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    # whatever has the size of a whole cache is an argument, or the scatter that updates one in place
    text = compiled.as_text()
    made = re.findall(rf"= \S*\[(?:{num_blocks}|{num_blocks * 4}),[\d,]*\]\S* ([\w-]+)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast", "scatter", "fusion"}, set(made)
    assert made.count("scatter") == made.count("fusion") == 4, "keys and values of two layers"
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kv)]
    _, kv = compiled(kv, batch.metadata)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kv)] == before


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_step_without_tiles_runs_no_loop_for_them(num_tokens: int) -> None:
    case = BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=((40, 1),) * num_tokens, num_padding_tokens=0)
    batch = make_batch(case, "xla")
    # one tile slot: the case in which XLA finds that the loop over keys does not depend on the tile
    slot = jnp.zeros(1, jnp.int32)
    metadata = dataclasses.replace(batch.metadata, tile_sequences=slot, tile_starts=slot, tile_lens=slot)
    assert int(metadata.num_tiles) == 0
    attend = jax.jit(partial(paged_attention, scale=1.0))
    text = attend.lower(batch.query, batch.key, batch.value, batch.kv, metadata).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count(" while(") == 1, "the loop over decodes alone"
    assert entry.count(" conditional(") == 1
