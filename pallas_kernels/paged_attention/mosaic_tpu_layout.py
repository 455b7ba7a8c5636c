"""The cache layout of mosaic_tpu.py in numpy and jnp: in a block a row is a token, and its lanes hold the heads.

Layer cache, bfloat16: one array of words uint32 [blocks, block_size, lanes]; the key is the low half of a word, the
value the high half, so that one copy brings both. float32: one array [blocks, 2, block_size, lanes], keys first.

int8 and float8_e4m3fn: a tuple of one array of words [blocks, block_size, word lanes + scale lanes], int32 and uint32.
Of the lanes that bfloat16 would have, the first half (in whole groups of 128) are the lower half words, the others the
upper ones; of a half word the key is the low byte, the value the high one. The bits of the scales stand behind: those
of the keys of all heads, then those of the values. So a copy brings all of a block, and a slot is one row here too.

The lanes of a token are *lane groups* of 128 (or the next multiple of 128 for longer heads), each holding as many heads
as fit whole: eight heads of 128 are eight groups, four heads of 64 two, four heads of 8 one. A query row is as wide as
its group and 0 outside its own head, so that one product serves all heads of a group; of an output row the lanes of its
own head count.

A block of any number of heads is a row of whole (8, 128) tiles, which is also what XLA prefers for such an array: the
cache is never copied into another layout.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from pallas_kernels.paged_attention.padding import pad_to, round_up
from pallas_kernels.paged_attention.quantization import Quantized, is_quantized, quantize

LANES, SUBLANES = 128, 8
"""The shape of a register of 32-bit numbers, and of a tile of an array of them."""
MAX_BLOCK_BYTES = 8 * 2**20
"""Largest block: two of them, and as many operands made of them, must fit in vector memory."""


@dataclass(frozen=True, kw_only=True)
class LaneGroups:
    """How the heads of a token share its lanes."""

    num_kv_heads: int
    head_dim: int

    @property
    def head_lanes(self) -> int:
        """Lanes from one head to the next of its group."""
        return self.head_dim if LANES % self.head_dim == 0 else round_up(self.head_dim, LANES)

    @property
    def heads(self) -> int:
        """Heads of a group."""
        return min(max(LANES // self.head_lanes, 1), self.num_kv_heads)

    @property
    def lanes(self) -> int:
        """Lanes of a group."""
        return round_up(self.heads * self.head_lanes, LANES)

    @property
    def count(self) -> int:
        return -(-self.num_kv_heads // self.heads)

    @property
    def word_lanes(self) -> int:
        """Lanes of a quantized row that hold keys and values: half of them all."""
        return round_up(self.count * self.lanes, 2 * LANES) // 2

    @property
    def scale_lanes(self) -> int:
        """Lanes of a quantized row that hold its scales."""
        return round_up(2 * self.num_kv_heads, LANES)


WORDS = {"int8": jnp.dtype(jnp.int32), "float8_e4m3fn": jnp.dtype(jnp.uint32)}
"""By quantized dtype, of what type its words are: for a cache to tell what it holds."""
QUANTIZED = {words: dtype for dtype, words in WORDS.items()}


def cache_shapes(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Any:
    """Shapes and dtypes of a layer cache."""
    groups = LaneGroups(num_kv_heads=num_kv_heads, head_dim=head_dim)
    if is_quantized(dtype):
        row = (block_size, groups.word_lanes + groups.scale_lanes)
        return (jax.ShapeDtypeStruct((num_blocks, *row), WORDS[jnp.dtype(dtype).name]),)
    row = (block_size, groups.count * groups.lanes)
    if dtype == jnp.bfloat16:
        return jax.ShapeDtypeStruct((num_blocks, *row), jnp.uint32)
    return jax.ShapeDtypeStruct((num_blocks, 2, *row), dtype)


def logical_dtype(kv: Any) -> jnp.dtype:
    """The logical dtype of a layer cache."""
    if isinstance(kv, tuple):
        return jnp.dtype(QUANTIZED[kv[0].dtype])
    return jnp.dtype(jnp.bfloat16 if kv.dtype == jnp.uint32 else kv.dtype)


def _to_lanes(heads: Any, groups: LaneGroups, numpy: Any) -> Any:
    """Lanes [..., groups * lanes] of heads [..., kv_heads, head_dim]."""
    leading = heads.shape[:-2]
    heads = pad_to(pad_to(heads, -1, groups.head_lanes, numpy), -2, groups.count * groups.heads, numpy)
    grouped = heads.reshape(*leading, groups.count, groups.heads * groups.head_lanes)
    return pad_to(grouped, -1, groups.lanes, numpy).reshape(*leading, groups.count * groups.lanes)


def _from_lanes(lanes: np.ndarray, groups: LaneGroups) -> np.ndarray:
    """The way back."""
    leading = lanes.shape[:-1]
    grouped = lanes.reshape(*leading, groups.count, groups.lanes)[..., : groups.heads * groups.head_lanes]
    heads = grouped.reshape(*leading, groups.count * groups.heads, groups.head_lanes)
    return heads[..., : groups.num_kv_heads, : groups.head_dim]


def _bits(array: Any, numpy: Any) -> Any:
    """The bits of an array, as uint32."""
    unsigned = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32}[array.dtype.itemsize]
    bits = array.view(unsigned) if numpy is np else lax.bitcast_convert_type(array, unsigned)
    return bits.astype(numpy.uint32)


def _quantized_rows(key: Quantized, value: Quantized, groups: LaneGroups, numpy: Any) -> Any:
    """Rows [..., word lanes + scale lanes] of heads [..., kv_heads, head_dim] and their scales."""
    dtype = WORDS[jnp.dtype(key.stored.dtype).name]
    halves = _bits(key.stored, numpy) | _bits(value.stored, numpy) << 8
    halves = pad_to(_to_lanes(halves, groups, numpy), -1, 2 * groups.word_lanes, numpy)
    words = halves[..., : groups.word_lanes] | halves[..., groups.word_lanes :] << 16
    scales = numpy.concatenate([_bits(key.scales, numpy), _bits(value.scales, numpy)], -1)
    rows = numpy.concatenate([words, pad_to(scales, -1, groups.scale_lanes, numpy)], -1)
    return rows.view(dtype) if numpy is np else lax.bitcast_convert_type(rows, dtype)


def pack(key: Any, value: Any) -> Any:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    if isinstance(key, Quantized):
        groups = LaneGroups(num_kv_heads=key.stored.shape[2], head_dim=key.stored.shape[3])
        return (_quantized_rows(key, value, groups, np),)
    groups = LaneGroups(num_kv_heads=key.shape[2], head_dim=key.shape[3])
    if key.dtype == jnp.bfloat16:
        return _to_lanes(_bits(key, np) | _bits(value, np) << 16, groups, np)
    return np.stack([_to_lanes(array, groups, np) for array in (key, value)], axis=1)


def unpack(kv: Any, num_kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    groups = LaneGroups(num_kv_heads=num_kv_heads, head_dim=head_dim)
    if isinstance(kv, tuple):
        (rows,) = kv
        dtype, rows = jnp.dtype(QUANTIZED[rows.dtype]), rows.view(np.uint32)
        words = rows[..., : groups.word_lanes]
        lanes = np.concatenate([words & 0xFFFF, words >> 16], -1)[..., : groups.count * groups.lanes]
        halves = _from_lanes(lanes, groups)
        key, value = ((halves >> shift).astype(np.uint8).view(dtype) for shift in (0, 8))
        scales = np.ascontiguousarray(rows[..., groups.word_lanes :]).view(np.float32)
        of_keys, of_values = scales[..., :num_kv_heads], scales[..., num_kv_heads : 2 * num_kv_heads]
        return Quantized(key, of_keys), Quantized(value, of_values)
    if kv.dtype == np.uint32:
        words = _from_lanes(kv, groups)
        parts = (words.astype(np.uint16), (words >> 16).astype(np.uint16))
        return parts[0].view(jnp.bfloat16), parts[1].view(jnp.bfloat16)
    return _from_lanes(kv[:, 0], groups), _from_lanes(kv[:, 1], groups)


def misfits(num_kv_heads: int, head_dim: int, block_size: int, dtype: str) -> list[str]:
    """Why such a cache cannot be served; empty when it can."""
    reasons = []
    if block_size % SUBLANES:
        reasons.append(f"needs a block size that is a multiple of {SUBLANES}, not {block_size}")
    (block,) = jax.tree.leaves(cache_shapes(1, block_size, num_kv_heads, head_dim, jnp.dtype(dtype)))
    if block.size * 4 > MAX_BLOCK_BYTES:
        reasons.append(
            f"needs blocks of at most {MAX_BLOCK_BYTES} bytes, not {block.size * 4}, as two must fit in vector memory"
        )
    return reasons


def token_rows(
    key: Shaped[Array, "tokens kv_heads head_dim"],
    value: Shaped[Array, "tokens kv_heads head_dim"],
    dtype: jnp.dtype,
    groups: LaneGroups,
) -> Shaped[Array, "tokens parts lanes"]:
    """Keys and values as a layer cache of a logical dtype has them in a slot: one row of words, or a row of each."""
    if is_quantized(dtype):
        rows = _quantized_rows(quantize(key, dtype, jnp), quantize(value, dtype, jnp), groups, jnp)
        return rows[:, None]
    key, value = key.astype(dtype), value.astype(dtype)
    if dtype == jnp.bfloat16:
        return _to_lanes(_bits(key, jnp) | _bits(value, jnp) << 16, groups, jnp)[:, None]
    return jnp.stack([_to_lanes(array, groups, jnp) for array in (key, value)], axis=1)


def query_rows(
    query: Shaped[Array, "tokens q_heads head_dim"], groups: LaneGroups
) -> Shaped[Array, "tokens groups rows lanes"]:
    """The query rows of each lane group, 0 outside the lanes of their own head."""
    num_tokens, num_q_heads, _ = query.shape
    per_head = num_q_heads // groups.num_kv_heads
    rows = pad_to(query, -1, groups.head_lanes, jnp)
    rows = pad_to(rows, 1, groups.count * groups.heads * per_head, jnp)
    rows = rows.reshape(num_tokens, groups.count, groups.heads, per_head, 1, groups.head_lanes)
    is_own = jnp.eye(groups.heads, dtype=bool)[:, None, :, None]
    rows = jnp.where(is_own, rows, jnp.zeros((), query.dtype))
    rows = rows.reshape(num_tokens, groups.count, groups.heads * per_head, groups.heads * groups.head_lanes)
    return pad_to(rows, -1, groups.lanes, jnp)


def output_heads(
    rows: Shaped[Array, "tokens groups rows lanes"], groups: LaneGroups, num_q_heads: int
) -> Shaped[Array, "tokens q_heads head_dim"]:
    """Of each output row the lanes of its own head."""
    num_tokens = rows.shape[0]
    per_head = num_q_heads // groups.num_kv_heads
    rows = rows[..., : groups.heads * groups.head_lanes]
    rows = rows.reshape(num_tokens, groups.count, groups.heads, per_head, groups.heads, groups.head_lanes)
    is_own = jnp.eye(groups.heads, dtype=bool)[:, None, :, None]
    rows = jnp.where(is_own, rows, jnp.zeros((), rows.dtype)).sum(4)
    return rows.reshape(num_tokens, -1, groups.head_lanes)[:, :num_q_heads, : groups.head_dim]
