"""The truth: paged attention in plain jnp, float32, one dense score matrix per query token. Slow, and meant to be read.

Layer cache: one array [blocks, block_size, 2, kv_heads, head_dim] of the logical dtype; keys are index 0, values 1.
A quantized one has two: that array, and float32 scales [blocks, block_size, 2, kv_heads].
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.quantization import Quantized, is_quantized, quantize

Cache = Float[Array, "blocks block_size 2 kv_heads head_dim"] | Quantized


def cache_shapes(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Any:
    """Shapes and dtypes of a layer cache."""
    shape = (num_blocks, block_size, 2, num_kv_heads, head_dim)
    heads = jax.ShapeDtypeStruct(shape, dtype)
    return Quantized(heads, jax.ShapeDtypeStruct(shape[:-1], jnp.float32)) if is_quantized(dtype) else heads


def pack(key: Any, value: Any) -> Any:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    return jax.tree.map(lambda *parts: np.stack(parts, axis=2), key, value)


def unpack(kv: Any, num_kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    return jax.tree.map(lambda leaf: leaf[:, :, 0], kv), jax.tree.map(lambda leaf: leaf[:, :, 1], kv)


def attend(
    query: Float[Array, "tokens q_heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    kv: Cache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Cache]:
    """The op as `api.paged_attention` defines it: write, then let each token attend to its own sequence."""
    num_tokens, num_q_heads, head_dim = query.shape
    num_kv_heads, (stored, *_) = key.shape[1], jax.tree.leaves(kv)
    block_size = stored.shape[1]
    blocks, offsets = metadata.slot_mapping // block_size, metadata.slot_mapping % block_size
    new: Any = jnp.stack([key, value], axis=1)
    new = quantize(new, stored.dtype, jnp) if is_quantized(stored.dtype) else new.astype(stored.dtype)
    kv = jax.tree.map(lambda leaf, rows: leaf.at[blocks, offsets].set(rows), kv, new)

    token = jnp.arange(num_tokens)
    seq = (metadata.query_starts[1:, None] <= token).sum(0).clip(max=metadata.context_lens.shape[0] - 1)
    is_real = token < metadata.query_starts[-1]
    position = metadata.context_lens[seq] - metadata.query_starts[seq + 1] + token

    gathered: Any = jax.tree.map(lambda leaf: leaf[metadata.block_tables[seq]], kv)
    # [tokens, blocks_per_seq, block_size, 2, ...]
    own = gathered.dequantized() if isinstance(gathered, Quantized) else gathered.astype(jnp.float32)
    own = own.reshape(num_tokens, -1, 2, num_kv_heads, head_dim)
    key_position = jnp.arange(own.shape[1])
    is_seen = (key_position <= position[:, None]) & is_real[:, None]
    if window is not None:
        is_seen &= key_position > position[:, None] - window
    keys = jnp.where(is_seen[:, :, None, None], own[:, :, 0], 0.0)  # a NaN times zero is NaN: clear what is not seen
    values = jnp.where(is_seen[:, :, None, None], own[:, :, 1], 0.0)

    grouped = query.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("thgd,tkhd->thgk", grouped, keys, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(is_seen[:, None, None, :], scores, -jnp.inf)
    # a sink is one more score that takes weight and brings no value
    sink = jnp.full(num_q_heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.broadcast_to(sink.reshape(num_kv_heads, -1), scores.shape[:-1])
    highest = jnp.where(is_real[:, None, None], jnp.maximum(scores.max(-1), sink), 0.0)
    weights = jnp.exp(scores - highest[..., None])
    total = weights.sum(-1) + jnp.exp(sink - highest)
    output = jnp.einsum("thgk,tkhd->thgd", weights, values, precision="highest") / total[..., None]
    output = jnp.where(is_real[:, None, None], output.reshape(query.shape), 0.0)
    return output.astype(query.dtype), kv
