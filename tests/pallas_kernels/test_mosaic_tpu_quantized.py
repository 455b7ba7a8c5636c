"""Quantized caches on TPU: what is stored in a word comes out of it, and scales stand on their own rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, check_equals_the_reference

from pallas_kernels.cases import CASES, with_options
from pallas_kernels.paged_attention.mosaic_tpu_layout import LaneGroups, cache_shapes, pack, unpack
from pallas_kernels.paged_attention.mosaic_tpu_quantized import scales_by_head, scales_of_rows, stored_keys_and_values
from pallas_kernels.paged_attention.quantization import LARGEST, quantize


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_every_number_that_is_stored_comes_out_of_each_byte_of_a_word(dtype: str) -> None:
    # two heads of 128 share the words of a row: the first in the lower halves, the second in the upper ones
    random = np.random.default_rng(0)
    stored = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
    stored = stored[np.abs(stored) <= LARGEST[dtype]]
    assert len(stored) == {"int8": 255, "float8_e4m3fn": 254}[dtype]
    heads = np.full((2, 1, 16, 2, 128), LARGEST[dtype], np.float32)  # one of these a head, and its scale is 1
    for kind, group in np.ndindex(2, 2):
        heads[kind, 0, :, group, 1:] = random.permutation(np.resize(stored, 16 * 127)).reshape(16, 127)
    key, value = heads
    (rows,) = pack(quantize(key, dtype, np), quantize(value, dtype, np))
    groups = LaneGroups(num_kv_heads=2, head_dim=128)
    for group in range(2):
        told = stored_keys_and_values(groups, jnp.dtype(dtype), jnp.dtype(jnp.float32), rows, group)
        for given, expected in zip(told, (key, value), strict=True):
            np.testing.assert_array_equal(given, expected[0, :, group])
    for given, expected in zip(unpack((rows,), 2, 128), (key, value), strict=True):
        np.testing.assert_array_equal(given.dequantized(), expected)


def test_the_scales_of_a_row_of_scores_are_those_of_its_head() -> None:
    # four heads of 64, two a group, and two query heads each; the largest number of a head is 127 times its scale
    scales = np.arange(1, 1 + 2 * 8 * 4, dtype=np.float32).reshape(2, 1, 8, 4, 1)
    key, value = np.broadcast_to(127 * scales, (2, 1, 8, 4, 64))
    (rows,) = pack(quantize(key, "int8", np), quantize(value, "int8", np))
    groups = LaneGroups(num_kv_heads=4, head_dim=64)
    by_head = scales_by_head(groups, rows)
    np.testing.assert_array_equal(by_head, scales.reshape(2, 8, 4).transpose(0, 2, 1).reshape(8, 8))
    # tiles of 8 tokens have 2 x 2 x 8 rows a group, heads 2 and 3 in the second
    found = scales_of_rows(groups, 32, 4, 8, by_head, 1, is_of_values=True)
    np.testing.assert_array_equal(found, np.repeat(scales[1, 0, :, 2:, 0].T, 16, axis=0))
    # a decode has 2 x 2 rows, and 4 more that nobody looks at
    found = scales_of_rows(groups, 8, 4, 1, by_head, 0, is_of_values=False)
    np.testing.assert_array_equal(found[:4], np.repeat(scales[0, 0, :, :2, 0].T, 2, axis=0))


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "token_bytes"),
    # 512 bytes for every 256 numbers of either kind, and 512 for up to 64 heads' scales
    [(8, 128, 4 * 512 + 512), (32, 128, 16 * 512 + 512), (1, 128, 512 + 512), (3, 64, 512 + 512), (65, 64, 9728)],
)
def test_a_token_takes_a_byte_for_each_number_and_a_group_of_lanes_for_its_scales(
    num_kv_heads: int, head_dim: int, token_bytes: int
) -> None:
    (block,) = cache_shapes(1, 8, num_kv_heads, head_dim, jnp.dtype("int8"))
    assert block.size * block.dtype.itemsize == 8 * token_bytes


@pytest.mark.parametrize("name", ["mixed, int8 and every option", "heads of 80, float8, block of 32"])
def test_equals_the_reference_in_float32(name: str) -> None:
    """Nothing but the order of sums differs: neither keys nor values are rounded once more."""
    (case,) = (case for case in CASES if case.name == name)
    (target,) = (target for target in TARGETS if target.name == "mosaic_tpu")
    check_equals_the_reference(with_options(case, input_dtype="float32"), target)
