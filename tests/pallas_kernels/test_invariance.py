"""What implementations promise beyond being right: a token's bits do not depend on its company."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, Target

from pallas_kernels import KVLayout, make_metadata, paged_attention
from pallas_kernels.cases import HEAD_SHAPES

TILE_SIZE, KEY_CHUNK_TOKENS = 8, 64
NUM_TOKENS, NUM_SEQS, BLOCKS_OF_TOKENS = 96, 4, 192


class Story:
    """Sequences of known tokens, fed to the op in any schedule, at any block size, everything in tiles."""

    def __init__(
        self,
        implementation: str,
        dtype: str = "float32",
        window: int | None = None,
        heads: str = "smollm-135m",
        has_decodes: bool = False,
    ) -> None:
        self.heads, self.dtype = HEAD_SHAPES[heads], dtype
        self.implementation, self.has_decodes = implementation, has_decodes
        options = {"scale": self.heads.head_dim**-0.5, "window": window, "soft_cap": 20.0}
        self.attend = jax.jit(
            partial(paged_attention, implementation=implementation, **options), donate_argnums=3
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
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            block_size=block_size,
            dtype=self.dtype,
            implementation=self.implementation,
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
                has_decodes=self.has_decodes,
            )
            arrays = []
            for kind in range(3):
                parts = [stories[row][kind][done[row] : done[row] + count] for row, count in step]
                joined = np.concatenate(parts)
                padded = np.full((NUM_TOKENS, *joined.shape[1:]), np.nan, np.float32)
                padded[: len(joined)] = joined
                arrays.append(jnp.asarray(padded, "bfloat16" if self.dtype == "bfloat16" else "float32"))
            output, kv = self.attend(*arrays, kv, metadata)
            output = np.asarray(output.astype(jnp.float32))
            first = 0
            for row, count in step:
                outputs[row, done[row] : done[row] + count] = output[first : first + count]
                done[row] += count
                first += count
        assert done == [length] * len(seeds)
        return outputs


@pytest.mark.parametrize(
    ("implementation", "has_decodes", "dtype", "window"),
    [
        *(
            (*kind, *options)
            for kind in (("xla", False), ("native_cpu", False), ("native_cpu", True))
            for options in (("float32", None), ("bfloat16", 37))
        ),
        ("xla", False, "int8", None),
    ],
)
def test_a_token_is_bit_equal_in_any_row_company_chunking_and_block_size(
    implementation: str, has_decodes: bool, dtype: str, window: int | None
) -> None:
    """`xla` promises it for what is in tiles, `native_cpu` for decodes too, which equal what they are in a tile."""
    story, length = Story(implementation, dtype, window, has_decodes=has_decodes), 70
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


@pytest.mark.parametrize("implementation", ["xla", "native_cpu"])
def test_a_token_is_bit_equal_where_every_query_head_has_its_own_keys(implementation: str) -> None:
    story = Story(implementation, heads="opt-125m")
    alone = story.tell([1], 40, [[(0, 40)]], block_size=16)[0]
    other = story.tell([1, 2], 40, [[(1, 3), (0, 5)], [(0, 35), (1, 37)]], block_size=8)[0]
    np.testing.assert_array_equal(other, alone)


# KERNELS FOR GPUS, interpreted or, on one, compiled: less is told, as each step takes a second or two

MOSAIC, TRITON = (next(one for one in TARGETS if one.name == name) for name in ("mosaic_gpu", "triton_gpu"))


@pytest.mark.parametrize(
    ("target", "window", "dtype"),
    [
        (TRITON, None, "bfloat16"),
        (TRITON, 37, "bfloat16"),
        (TRITON, None, "int8"),
        (MOSAIC, 37, "bfloat16"),
        # interpreted Hopper kernels take 18 s for each
        pytest.param(MOSAIC, None, "bfloat16", marks=pytest.mark.slow),
        pytest.param(MOSAIC, None, "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param(MOSAIC, 37, "int8", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_token_in_a_tile_is_bit_equal_in_any_row_company_chunking_and_block_size(
    target: Target, window: int | None, dtype: str
) -> None:
    """What batch-invariant mode counts on, as it puts decodes into tiles too."""
    length = 80  # more than a chunk of 64 keys
    with target.running():
        story = Story(target.name, dtype, window, "stories260k")
        alone = story.tell([1], length, [[(0, length)]], block_size=16)[0]
        assert np.isfinite(alone).all()
        assert alone.any()
        chunks = [[(0, 69)], [(0, 1)], [(0, 1)], [(0, 9)]]
        chunked = story.tell([1], length, chunks, block_size=64)[0]
        np.testing.assert_array_equal(chunked, alone, err_msg="in chunks, the last but one of a token each, block 64")
        company = [[(2, 5), (0, 11), (1, 80)], [(2, 75), (0, 3)], [(0, 66)]]
        in_company = story.tell([1, 2, 3], length, company, block_size=8)[0]
        np.testing.assert_array_equal(in_company, alone, err_msg="in company, block 8")


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        (TRITON, "bfloat16"),
        (TRITON, "float8_e4m3fn"),
        (MOSAIC, "bfloat16"),
        pytest.param(MOSAIC, "int8", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_decode_is_bit_equal_in_company_that_needs_no_longer_items(target: Target, dtype: str) -> None:
    """Decodes share 16 programs of 4 heads here, so 4 items: two sequences of 2 chunks each leave a chunk an item.

    Company that is longer in sum makes items longer, and sums others: `cut_into_items` says from where on.
    """
    with target.running():
        story = Story(target.name, dtype, heads="stories260k", has_decodes=True)
        first, length = 66, 68
        alone = story.tell([1], length, [[(0, first)], [(0, 1)], [(0, 1)]], block_size=16)[0]
        company = [[(0, first)], [(1, first)], [(1, 1), (0, 1)], [(1, 1), (0, 1)]]
        in_company = story.tell([1, 2], length, company, block_size=16)[0]
    assert alone[first:].any()
    np.testing.assert_array_equal(in_company[first:], alone[first:])
