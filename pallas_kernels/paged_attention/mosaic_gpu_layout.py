"""The cache layout of mosaic_gpu.py in numpy and jnp: a (block, head) is one slab, which one bulk copy brings.

Layer cache: keys and values, each [blocks, kv_heads, block_size, lanes] of the logical dtype. Lanes are the head dim,
padded with zeros to a multiple of 32 bytes or 16 lanes: a copy moves rows of whole 32-byte pieces, and a matrix product
takes 16 lanes at a time. A quantized cache has float32 scales of keys and of values behind, each
[blocks, kv_heads, block_size]: those of a (block, head) are one copy too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from pallas_kernels.paged_attention.padding import pad_to, round_up
from pallas_kernels.paged_attention.quantization import Quantized, is_quantized, quantize

ROW_MULTIPLE = 8
"""Shared memory holds matrices as tiles of 8 rows; a block starts at a tile."""
MAX_LANES = 256
"""A matrix product is at most this wide, and wider accumulators would not fit in registers."""
MAX_GROUP = 64
"""Query heads of a key-value head: the rows of a matrix instruction."""
COMPUTE_CAPABILITY = "9.0"

Cache = tuple[Array, ...]
"""Keys and values, and of a quantized cache the scales of either."""


def lane_multiple(dtype: Any) -> int:
    """What lanes of a dtype are a multiple of."""
    return 32 if jnp.dtype(dtype).itemsize == 1 else 16


def tile_chunk_tokens(head_dim: int, dtype: Any, has_soft_cap: bool = False) -> int:
    """Keys of one turn of the tile kernel: as many as leave room in registers for scores and outputs.

    Bytes stand in shared memory as bfloat16 too, which leaves room there for fewer.
    """
    return 128 if head_dim <= 128 and not has_soft_cap and not is_quantized(dtype) else 64


DECODE_CHUNK_TOKENS = 64
"""Keys of one turn of the decode kernel."""


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of a layer cache."""
    shape = (num_blocks, num_kv_heads, block_size, round_up(head_dim, lane_multiple(dtype)))
    heads, scales = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return (heads, heads, scales, scales) if is_quantized(dtype) else (heads, heads)


def pad_lanes(array: Any, dtype: Any, numpy: Any) -> Any:
    """`array` with zeros behind its last axis, as many as a cache of `dtype` has."""
    return pad_to(array, -1, round_up(array.shape[-1], lane_multiple(dtype)), numpy)


def pack(key: Any, value: Any) -> tuple[np.ndarray, ...]:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    if isinstance(key, Quantized):
        scales = (np.ascontiguousarray(heads.scales.transpose(0, 2, 1)) for heads in (key, value))
        return *pack(key.stored, value.stored), *scales
    key, value = (pad_lanes(array.transpose(0, 2, 1, 3), array.dtype, np) for array in (key, value))
    return np.ascontiguousarray(key), np.ascontiguousarray(value)


def unpack(kv: tuple[np.ndarray, ...], num_kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    key, value = (array[..., :head_dim].transpose(0, 2, 1, 3) for array in kv[:2])
    if len(kv) == 2:
        return key, value
    key_scales, value_scales = (array.transpose(0, 2, 1) for array in kv[2:])
    return Quantized(key, key_scales), Quantized(value, value_scales)


def misfits(
    num_kv_heads: int,
    num_q_heads: int | None,
    head_dim: int,
    block_size: int,
    dtype: str,
    compute_capability: str | None,
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
    chunks = {DECODE_CHUNK_TOKENS, tile_chunk_tokens(head_dim, dtype)}
    if block_size % ROW_MULTIPLE or any(max(chunk, block_size) % min(chunk, block_size) for chunk in chunks):
        smaller = ", ".join(str(size) for size in (8, 16, 32, 64) if size < max(chunks))
        reasons.append(
            f"needs a block size of {smaller} or a multiple of {max(chunks)}, not {block_size}, as keys are read "
            f"{' and '.join(str(chunk) for chunk in sorted(chunks))} at a time"
        )
    return reasons


def write(kv: Cache, key: Array, value: Array, slot_mapping: Int[Array, "tokens"]) -> Cache:
    """The cache with each token's key and value in its slot; what goes to block 0, as padding does, is not written.

    All other slots are distinct, as `slot_mapping` promises, and XLA is told so.
    """
    num_blocks, _, block_size, _ = kv[0].shape
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    # many tokens share the null block: each gets a block behind the cache, another one, and is dropped
    behind = num_blocks + jnp.arange(blocks.shape[0], dtype=blocks.dtype)
    blocks = jnp.where(blocks == 0, behind, blocks)
    dtype = kv[0].dtype
    if is_quantized(dtype):
        heads, scales = zip(*(quantize(rows, dtype, jnp) for rows in (key, value)), strict=True)
    else:
        heads, scales = (key.astype(dtype), value.astype(dtype)), ()
    new = (*(pad_lanes(rows, dtype, jnp) for rows in heads), *scales)
    return tuple(_scatter(leaf, blocks, offsets, rows) for leaf, rows in zip(kv, new, strict=True))


def _scatter(
    leaf: Array, blocks: Int[Array, "tokens"], offsets: Int[Array, "tokens"], rows: Shaped[Array, "tokens kv_heads ..."]
) -> Array:
    # unless indices are distinct, a GPU writes 8- and 16-bit elements by compare-and-swap, one at a time
    return leaf.at[blocks, :, offsets].set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)
