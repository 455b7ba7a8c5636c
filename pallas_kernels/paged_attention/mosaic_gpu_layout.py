"""The cache layout of mosaic_gpu.py in numpy and jnp: a (block, head) is one slab, which one bulk copy brings.

Layer cache: keys and values, each bfloat16 [blocks, kv_heads, block_size, lanes]. Lanes are the head dim, padded with
zeros to a multiple of 16: a copy moves rows of whole 32-byte pieces, and a matrix product takes 16 lanes at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from pallas_kernels.paged_attention.padding import pad_to, round_up

LANE_MULTIPLE = 16
ROW_MULTIPLE = 8
"""Shared memory holds matrices as tiles of 8 rows; a block starts at a tile."""
MAX_LANES = 256
"""A matrix product is at most this wide, and wider accumulators would not fit in registers."""
MAX_GROUP = 64
"""Query heads of a key-value head: the rows of a matrix instruction."""
COMPUTE_CAPABILITY = "9.0"

Cache = tuple[Array, Array]


def chunk_tokens(head_dim: int, has_soft_cap: bool = False) -> int:
    """Keys of one turn of the tile kernel: as many as leave room in registers for scores and outputs."""
    return 128 if head_dim <= 128 and not has_soft_cap else 64


DECODE_CHUNK_TOKENS = 64
"""Keys of one turn of the decode kernel."""


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes and dtype of a layer cache."""
    shape = (num_blocks, num_kv_heads, block_size, round_up(head_dim, LANE_MULTIPLE))
    return jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape, dtype)


def pad_lanes(array: Any, numpy: Any) -> Any:
    """`array` with zeros behind its last axis."""
    return pad_to(array, -1, round_up(array.shape[-1], LANE_MULTIPLE), numpy)


def pack(key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    key, value = (pad_lanes(array.transpose(0, 2, 1, 3), np) for array in (key, value))
    return np.ascontiguousarray(key), np.ascontiguousarray(value)


def unpack(kv: tuple[np.ndarray, np.ndarray], num_kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    key, value = (array[..., :head_dim].transpose(0, 2, 1, 3) for array in kv)
    return key, value


def misfits(
    num_kv_heads: int, num_q_heads: int | None, head_dim: int, block_size: int, compute_capability: str | None
) -> list[str]:
    """Why such a cache cannot be served; empty when it can."""
    reasons = []
    if compute_capability != COMPUTE_CAPABILITY:
        reasons.append(
            f"needs compute capability {COMPUTE_CAPABILITY} (Hopper: its matrix instructions are on no other), "
            f"not {compute_capability or 'an unknown one'}"
        )
    if num_q_heads is not None and num_q_heads > MAX_GROUP * num_kv_heads:
        reasons.append(
            f"needs at most {MAX_GROUP} query heads for each key-value head, not {num_q_heads} for {num_kv_heads}"
        )
    if head_dim > MAX_LANES:
        reasons.append(f"needs a head dim of at most {MAX_LANES}, not {head_dim}")
    # a block is some whole chunks of each kernel, or a whole fraction of one
    chunks = {DECODE_CHUNK_TOKENS, chunk_tokens(head_dim)}
    if block_size % ROW_MULTIPLE or any(max(chunk, block_size) % min(chunk, block_size) for chunk in chunks):
        reasons.append(
            f"needs a block size of 8, 16, 32, 64 or a multiple of {max(chunks)}, not {block_size}, as keys are read "
            f"{' and '.join(str(chunk) for chunk in sorted(chunks))} at a time"
        )
    return reasons


def write(kv: Cache, key: Array, value: Array, slot_mapping: Int[Array, "tokens"]) -> Cache:
    """The cache with each token's key and value in its slot; what goes to block 0, as padding does, is not written.

    All other slots are distinct, as `slot_mapping` promises, and XLA is told so.
    """
    keys, values = kv
    num_blocks, _, block_size, _ = keys.shape
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    # many tokens share the null block: each gets a block behind the cache, another one, and is dropped
    behind = num_blocks + jnp.arange(blocks.shape[0], dtype=blocks.dtype)
    blocks = jnp.where(blocks == 0, behind, blocks)
    return _scatter(keys, blocks, offsets, key), _scatter(values, blocks, offsets, value)


def _scatter(
    cache: Array,
    blocks: Int[Array, "tokens"],
    offsets: Int[Array, "tokens"],
    heads: Shaped[Array, "tokens kv_heads head_dim"],
) -> Array:
    # unless indices are distinct, a GPU writes 16-bit elements by compare-and-swap, one at a time
    return cache.at[blocks, :, offsets].set(
        pad_lanes(heads.astype(cache.dtype), jnp), mode="drop", unique_indices=True, wrap_negative_indices=False
    )
