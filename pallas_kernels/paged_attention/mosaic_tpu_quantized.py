"""What the TPU kernel makes of a chunk of a quantized cache in vector memory (its layout: mosaic_tpu_layout.py).

Stored numbers become operands as they are, exact in bfloat16; scales go on scores and weights, as quantization.py says.
In memory the scales of a token are lanes of its row, on a score matrix a token is a lane: a product with rows of zeros
and a one turns them, for all heads at once, and exactly, as it asks for full precision.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, SUBLANES, LaneGroups
from pallas_kernels.paged_attention.padding import round_up


def _rows(chunk: Any, lanes: slice) -> Shaped[Array, "keys lanes"]:
    """Some lanes of a chunk [blocks, block_size, lanes], as int32."""
    words = chunk[:, :, lanes]
    return lax.bitcast_convert_type(words.reshape(-1, words.shape[-1]), jnp.int32)


def _byte(words: Shaped[Array, "keys lanes"], shift: int, cache_dtype: jnp.dtype) -> Float[Array, "keys lanes"]:
    """One of the four numbers of each word, as float32."""
    if cache_dtype == jnp.int8:
        # up to the sign bit and back
        return (words << (24 - shift) >> 24).astype(jnp.float32)
    magnitude = words >> shift & 0x7F
    # four bits of exponent, whose zero is 7 in float8 and 127 in float32, and three of fraction
    normal = lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    # without an exponent: eighths of the smallest number that has one, 2 ** -6
    small = magnitude.astype(jnp.float32) * 2.0**-9
    number = jnp.where(magnitude < 8, small, normal)
    return jnp.where((words >> shift & 0x80) != 0, -number, number)


def stored_keys_and_values(
    groups: LaneGroups, cache_dtype: jnp.dtype, dtype: jnp.dtype, chunk: Any, group: int
) -> tuple[Shaped[Array, "keys lanes"], Shaped[Array, "keys lanes"]]:
    """One lane group of a chunk as operands, without their scales."""
    keys, values = [], []
    for lane in range(group * groups.lanes, (group + 1) * groups.lanes, LANES):
        half, lane_of_word = divmod(lane, groups.word_lanes)
        words = _rows(chunk, slice(lane_of_word, lane_of_word + LANES))
        keys.append(_byte(words, 16 * half, cache_dtype).astype(dtype))
        values.append(_byte(words, 16 * half + 8, cache_dtype).astype(dtype))
    return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)


def scales_by_head(groups: LaneGroups, chunk: Any) -> Float[Array, "two_kv_heads keys"]:
    """The scales of all keys of a chunk: a row for each head's keys, then one for each head's values, then others.

    One that is not finite makes all of its token's so.
    """
    scales = lax.bitcast_convert_type(
        _rows(chunk, slice(groups.word_lanes, groups.word_lanes + groups.scale_lanes)), jnp.float32
    )
    picked = (round_up(2 * groups.num_kv_heads, SUBLANES), groups.scale_lanes)
    row, lane = (lax.broadcasted_iota(jnp.int32, picked, axis) for axis in (0, 1))
    return lax.dot_general(
        jnp.where(row == lane, 1.0, 0.0), scales, (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


def scales_of_rows(
    groups: LaneGroups, group_rows: int, rows_per_token: int, token_rows: int,
    scales: Float[Array, "two_kv_heads keys"], group: int, *, is_of_values: bool,
) -> Float[Array, "#rows keys"]:  # fmt: skip
    """For each row of a group's score matrix, which has all tokens of a query head and then those of the next, the
    scales of its head; one row where all have the same."""
    first = group * groups.heads
    last = min(first + groups.heads, groups.num_kv_heads)
    begin = groups.num_kv_heads if is_of_values else 0
    found = scales[begin + first : begin + first + 1]
    rows_per_head = rows_per_token // groups.heads * token_rows
    for head in range(first + 1, last):
        row = lax.broadcasted_iota(jnp.int32, (group_rows, scales.shape[1]), 0)
        found = jnp.where(row < (head - first) * rows_per_head, found, scales[begin + head : begin + head + 1])
    return found
