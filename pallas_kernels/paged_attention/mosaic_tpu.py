"""Paged attention for TPU: what surrounds the Pallas kernel (mosaic_tpu_kernel.py; the cache: mosaic_tpu_layout.py).

One call writes the new keys and values into their slots (mosaic_tpu_write.py); when all of them are there, one attends
the decodes and one the tiles. Each has as many programs as there is work, none at times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.mosaic_tpu_kernel import attend_decodes, attend_tiles
from pallas_kernels.paged_attention.mosaic_tpu_layout import (
    LANES,
    SUBLANES,
    LaneGroups,
    logical_dtype,
    output_heads,
    query_rows,
    token_rows,
)
from pallas_kernels.paged_attention.mosaic_tpu_shape import KernelShape
from pallas_kernels.paged_attention.mosaic_tpu_write import SLOT_BYTES, write_rows
from pallas_kernels.paged_attention.padding import pad_to, round_up
from pallas_kernels.paged_attention.tuning import ShapeClass, tuned_sizes

MAX_SCALAR_BYTES = 960 * 2**10
"""Block tables, tiles and slots are read from scalar memory: 1 MiB on v5e and v6e, of which the compiler takes some
KiB."""
MAX_VMEM_BYTES = 96 * 2**20
"""Most vector memory a call may ask for, of the 128 MiB of v5e and v6e."""
VMEM_SPARE_BYTES = 16 * 2**20
"""What the compiler gets beside the buffers: what is computed between them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How decodes are run. The defaults are guesses that no measurement has tuned."""

    decode_chunk_bytes: int = 2 * 2**20
    """Keys and values of one decode chunk, at most; there are two buffers of it."""
    max_decode_chunk_tokens: int = 1024


def default_launch() -> Launch:
    """The launch where nothing was tuned."""
    return Launch()


def launch_for(shape: ShapeClass) -> Launch:
    """The launch as it was tuned for the device that is traced for, or the default."""
    tuned: Mapping[str, Any] = tuned_sizes(shape).launch
    return replace(default_launch(), **tuned)


def _check_scalars(metadata: AttentionMetadata, block_size: int) -> None:
    (num_seqs, blocks_per_seq), num_tiles = metadata.block_tables.shape, metadata.tile_sequences.shape[0]
    scalar_bytes = 4 * (num_seqs * blocks_per_seq + max(num_seqs, 4 * num_tiles))
    if scalar_bytes > MAX_SCALAR_BYTES:
        raise ValueError(
            f"block tables of {num_seqs} sequences with {blocks_per_seq} blocks of {block_size} tokens, and "
            f"{num_tiles} tiles, take {scalar_bytes} bytes of scalar memory, which has room for {MAX_SCALAR_BYTES}: "
            "use larger blocks, fewer or shorter sequences, or implementation='xla'"
        )
    num_tokens = metadata.slot_mapping.shape[0]
    if SLOT_BYTES * num_tokens > MAX_SCALAR_BYTES:
        raise ValueError(
            f"the slots of {num_tokens} tokens take {SLOT_BYTES * num_tokens} bytes of scalar memory, which has room "
            f"for {MAX_SCALAR_BYTES}: use fewer tokens a step, or implementation='xla'"
        )


def _vmem_limit(shape: KernelShape) -> int:
    """Bytes of vector memory for one call. Raises ValueError when that is more than there is."""
    limit = shape.buffer_bytes + VMEM_SPARE_BYTES
    if limit > MAX_VMEM_BYTES:
        raise ValueError(
            f"tiles of {shape.token_rows} tokens with {shape.num_groups * shape.rows_per_token} query heads, and "
            f"chunks of {shape.chunk_tokens} keys, take {limit} bytes of vector memory, which has room for "
            f"{MAX_VMEM_BYTES}: lower tile_size, key_chunk_tokens or the block size"
        )
    return limit


def _sink_rows(
    sinks: Float[Array, "q_heads"] | None, groups: LaneGroups, num_rows: int, repeats: int
) -> Float[Array, "groups rows 1"]:
    """The sink of each row of each group's score matrix; one dummy row where there are none."""
    if sinks is None:
        return jnp.zeros((1, 1, 1), jnp.float32)
    per_group = groups.heads * sinks.shape[0] // groups.num_kv_heads
    rows = pad_to(sinks.astype(jnp.float32), 0, groups.count * per_group, jnp).reshape(groups.count, per_group)
    return jnp.repeat(pad_to(rows, 1, num_rows, jnp), repeats, axis=1)[..., None]


def _attend_decodes(
    rows: Float[Array, "tokens groups rows lanes"],
    kv: Array,
    metadata: AttentionMetadata,
    shape: KernelShape,
    groups: LaneGroups,
    sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "tokens groups rows lanes"]:
    """Output rows of the decodes; those of other tokens are anything."""
    num_tokens, num_seqs = rows.shape[0], metadata.context_lens.shape[0]
    # a decode sequence is the token of its own number
    decodes = pad_to(pad_to(rows[:num_seqs], 0, num_seqs, jnp), 2, shape.group_rows, jnp)
    attended = attend_decodes(
        shape,
        decodes.astype(shape.dtype),
        _sink_rows(sinks, groups, shape.group_rows, 1),
        kv,
        metadata.block_tables,
        metadata.context_lens,
        metadata.num_decodes,
        output_dtype=rows.dtype,
        vmem_limit_bytes=_vmem_limit(shape),
    )
    return pad_to(attended[:num_tokens, :, : shape.rows_per_token], 0, num_tokens, jnp)


def _attend_tiles(
    rows: Float[Array, "tokens groups rows lanes"],
    kv: Array,
    metadata: AttentionMetadata,
    shape: KernelShape,
    groups: LaneGroups,
    sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "tokens groups rows lanes"]:
    """Output rows of the tokens of all tiles; those of other tokens are anything."""
    num_tokens = rows.shape[0]
    packed = rows.astype(jnp.float32).reshape(num_tokens, -1, LANES)
    packed = pad_to(pad_to(packed, 1, shape.packed_rows, jnp), 0, num_tokens + shape.token_rows, jnp)
    sequences, starts = metadata.tile_sequences, metadata.tile_starts
    first_positions = metadata.context_lens[sequences] - metadata.query_starts[sequences + 1] + starts
    attended = attend_tiles(
        shape,
        packed.reshape(-1, LANES),
        _sink_rows(sinks, groups, shape.rows_per_token, shape.token_rows),
        kv,
        metadata.block_tables,
        (sequences, starts, first_positions, metadata.tile_lens),
        metadata.num_tiles,
        vmem_limit_bytes=_vmem_limit(shape),
    )
    attended = attended.reshape(-1, shape.packed_rows, LANES)
    attended = attended[:num_tokens, : groups.count * shape.rows_per_token * shape.pieces]
    return attended.reshape(rows.shape).astype(rows.dtype)


def attend(
    query: Float[Array, "tokens q_heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    kv: Any,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
    launch: Launch | None = None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Any]:
    """The op as `api.paged_attention` defines it. Raises ValueError where scalar or vector memory is too small.

    `launch` None takes `launch_for`.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    (cache,) = jax.tree.leaves(kv)
    num_kv_heads, block_size = key.shape[1], cache.shape[-2]
    blocks_per_seq = metadata.block_tables.shape[1]
    _check_scalars(metadata, block_size)
    groups = LaneGroups(num_kv_heads=num_kv_heads, head_dim=head_dim)
    dtype = logical_dtype(kv)
    new_rows = token_rows(key, value, dtype, groups)
    cache = write_rows(cache, new_rows, metadata.slot_mapping, metadata.query_starts[-1])
    kv = jax.tree.map(lambda _: cache, kv)

    # products of numbers of bfloat16, which quantized ones are too, are exact in float32: so nothing is lost unless
    # queries bring more digits
    is_exact = dtype != jnp.float32 and query.dtype == jnp.bfloat16
    tile_shape = KernelShape(
        rows_per_token=groups.heads * (num_q_heads // num_kv_heads),
        token_rows=round_up(metadata.tile_size, SUBLANES),
        block_size=block_size,
        blocks_per_seq=blocks_per_seq,
        chunk_blocks=metadata.key_chunk_tokens // block_size,
        groups=groups,
        cache_dtype=dtype,
        dtype=jnp.dtype(jnp.bfloat16 if is_exact else jnp.float32),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
    )
    if launch is None:
        launch = launch_for(
            ShapeClass(
                implementation="mosaic_tpu", dtype=dtype.name, head_dim=head_dim,
                block_size=block_size, num_kv_heads=num_kv_heads, group=num_q_heads // num_kv_heads,
            )  # fmt: skip
        )
    decode_tokens = min(launch.decode_chunk_bytes // tile_shape.token_bytes, launch.max_decode_chunk_tokens)
    decode_blocks = min(max(decode_tokens // block_size, 1), blocks_per_seq)
    decode_shape = replace(tile_shape, token_rows=1, chunk_blocks=decode_blocks)
    rows = query_rows(query, groups)
    decoded = output_heads(_attend_decodes(rows, cache, metadata, decode_shape, groups, sinks), groups, num_q_heads)
    token = jnp.arange(num_tokens)[:, None, None]
    output = jnp.where(token < metadata.num_decodes, decoded, jnp.zeros((), query.dtype))
    if not metadata.tile_sequences.shape[0]:
        return output, kv

    tiled = output_heads(_attend_tiles(rows, cache, metadata, tile_shape, groups, sinks), groups, num_q_heads)
    is_tiled = (token >= metadata.num_decodes) & (token < metadata.query_starts[-1])
    return jnp.where(is_tiled, tiled, output), kv
