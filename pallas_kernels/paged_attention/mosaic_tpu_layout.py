"""The cache layout of mosaic_tpu.py in numpy and jnp: in a block a row is a token, and its lanes hold the heads.

Layer cache, bfloat16: one array of words uint32 [blocks, block_size, lanes]; the key is the low half of a word, the
value the high half, so that one copy brings both. float32: one array [blocks, 2, block_size, lanes], keys first.

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


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a layer cache."""
    groups = LaneGroups(num_kv_heads=num_kv_heads, head_dim=head_dim)
    row = (block_size, groups.count * groups.lanes)
    if dtype == jnp.bfloat16:
        return jax.ShapeDtypeStruct((num_blocks, *row), jnp.uint32)
    return jax.ShapeDtypeStruct((num_blocks, 2, *row), dtype)


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


def pack(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    groups = LaneGroups(num_kv_heads=key.shape[2], head_dim=key.shape[3])
    if key.dtype == jnp.bfloat16:
        low, high = (array.view(np.uint16).astype(np.uint32) for array in (key, value))
        return _to_lanes(low | high << np.uint32(16), groups, np)
    return np.stack([_to_lanes(array, groups, np) for array in (key, value)], axis=1)


def unpack(kv: np.ndarray, num_kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    groups = LaneGroups(num_kv_heads=num_kv_heads, head_dim=head_dim)
    if kv.dtype == np.uint32:
        words = _from_lanes(kv, groups)
        halves = (words.astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16))
        return halves[0].view(jnp.bfloat16), halves[1].view(jnp.bfloat16)
    return _from_lanes(kv[:, 0], groups), _from_lanes(kv[:, 1], groups)


def misfits(num_kv_heads: int, head_dim: int, block_size: int, dtype: str) -> list[str]:
    """Why such a cache cannot be served; empty when it can."""
    reasons = []
    if block_size % SUBLANES:
        reasons.append(f"needs a block size that is a multiple of {SUBLANES}, not {block_size}")
    block = cache_shapes(1, block_size, num_kv_heads, head_dim, jnp.dtype(dtype))
    if block.size * 4 > MAX_BLOCK_BYTES:
        reasons.append(
            f"needs blocks of at most {MAX_BLOCK_BYTES} bytes, not {block.size * 4}, as two must fit in vector memory"
        )
    return reasons


def _bits(array: Array) -> Array:
    return lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)


def token_rows(
    key: Shaped[Array, "tokens kv_heads head_dim"],
    value: Shaped[Array, "tokens kv_heads head_dim"],
    dtype: jnp.dtype,
    groups: LaneGroups,
) -> Shaped[Array, "tokens parts lanes"]:
    """Keys and values as a layer cache of `dtype` has them in a slot: one row of words, or a row of each."""
    if dtype == jnp.uint32:
        return _to_lanes(_bits(key) | _bits(value) << 16, groups, jnp)[:, None]
    return jnp.stack([_to_lanes(array.astype(dtype), groups, jnp) for array in (key, value)], axis=1)


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
