"""Paged attention for CUDA GPUs from Ampere on, in Pallas kernels that Triton compiles (triton_gpu_kernel.py).

The Triton backend of Pallas is deprecated since jax 0.11 and will be removed: this is a second path, for GPUs that
mosaic_gpu.py does not serve and for float32 caches on those that it does. New keys and values are scattered by XLA
first. Decodes are cut along their keys into items of about equal work (split KV: Dao et al. 2023, Flash-Decoding),
which a second kernel merges; tiles are one call. Programs of slots without work end at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.gpu_items import cut_into_items
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.mosaic_gpu_layout import Cache, pad_lanes, write
from pallas_kernels.paged_attention.quantization import is_quantized
from pallas_kernels.paged_attention.triton_gpu_kernel import (
    LOG2_E,
    MASKED,
    KernelShape,
    Launch,
    attend_decodes,
    attend_tiles,
    merge_items,
)
from pallas_kernels.paged_attention.tuning import ShapeClass, tuned_sizes


def default_launch() -> Launch:
    """The launch where nothing was tuned."""
    return Launch()


def launch_for(shape: ShapeClass) -> Launch:
    """The launch as it was tuned for the device that is traced for, or the default."""
    tuned: Mapping[str, Any] = tuned_sizes(shape).launch
    return replace(default_launch(), **tuned)


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
    launch: Launch | None = None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Cache]:
    """The op as `api.paged_attention` defines it. Queries are rounded to the dtype of the cache, or to bfloat16.

    `launch` None takes `launch_for`.
    """
    num_q_heads, head_dim = query.shape[1:]
    kv = write(kv, key, value, metadata.slot_mapping)
    stored, (_, num_kv_heads, block_size, lanes) = kv[0].dtype, kv[0].shape
    group = num_q_heads // num_kv_heads
    if launch is None:
        launch = launch_for(
            ShapeClass(
                implementation="triton_gpu", dtype=stored.name, head_dim=head_dim, block_size=block_size,
                num_kv_heads=num_kv_heads, group=group,
            )  # fmt: skip
        )
    dtype = jnp.dtype(jnp.bfloat16) if is_quantized(stored) else stored
    rows = pad_lanes(query.astype(dtype), stored, jnp)
    read = kv
    if stored == jnp.float8_e4m3fn:
        read = (*(lax.bitcast_convert_type(heads, jnp.uint8) for heads in kv[:2]), *kv[2:])
    shape = KernelShape(
        num_kv_heads=num_kv_heads,
        group=group,
        lanes=lanes,
        block_size=block_size,
        dtype=dtype,
        is_quantized=is_quantized(stored),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    sinks = jnp.full(num_q_heads, MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    # the kernels write rows of tokens, decodes first; rows of padding tokens stay 0
    output = jnp.zeros(rows.shape, query.dtype)

    is_decode = jnp.arange(metadata.context_lens.shape[0]) < metadata.num_decodes
    lens = jnp.where(is_decode, metadata.context_lens, 0)
    decode_shape = replace(shape, turn_tokens=launch.decode_turn_tokens)
    items = cut_into_items(
        lens,
        decode_shape.chunk,
        window,
        num_items=-(-launch.decode_programs // num_kv_heads),
        min_chunks=launch.min_item_chunks,
    )
    partials = attend_decodes(decode_shape, launch, rows, read, metadata.block_tables, lens, items)
    output = merge_items(shape, launch, *partials, sinks, items.first_items, output)

    sequences, starts = metadata.tile_sequences, metadata.tile_starts
    if sequences.shape[0]:
        positions = metadata.context_lens[sequences] - metadata.query_starts[sequences + 1] + starts
        output = attend_tiles(
            shape, launch, metadata.tile_size, rows, read, sinks, metadata.block_tables, sequences, starts, positions,
            metadata.tile_lens, metadata.num_tiles[None], output,
        )  # fmt: skip
    return output[..., :head_dim], kv
