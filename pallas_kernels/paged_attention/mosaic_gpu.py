"""Paged attention for Hopper GPUs: what surrounds the Pallas kernels (decodes: mosaic_gpu_decodes.py, tiles:
mosaic_gpu_tiles.py; the cache: mosaic_gpu_layout.py).

New keys and values are scattered by XLA first. Decodes are cut along their keys into items of about equal work (split
KV: Dao et al. 2023, Flash-Decoding), whose partial outputs a second kernel merges by their log-sum-exps; tiles are one
call. Without tiles or decodes their programs end at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.gpu_items import cut_into_items
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.mosaic_gpu_chunk import (
    LOG2_E,
    MASKED,
    MAX_STAGES,
    ROWS,
    SMEM_BYTES,
    KernelShape,
)
from pallas_kernels.paged_attention.mosaic_gpu_decodes import attend_decodes, merge_items
from pallas_kernels.paged_attention.mosaic_gpu_layout import (
    DECODE_CHUNK_TOKENS,
    Cache,
    pad_lanes,
    tile_chunk_tokens,
    write,
)
from pallas_kernels.paged_attention.mosaic_gpu_tiles import TileShape, attend_tiles, output_row
from pallas_kernels.paged_attention.tuning import ShapeClass, tuned_sizes
from pallas_kernels.platform import target_num_multiprocessors

NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200, for where a device does not tell."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How kernels are run. The defaults are guesses that no measurement has tuned."""

    num_multiprocessors: int = NUM_MULTIPROCESSORS
    """Of the device. Fewer or more are served as well, less evenly."""
    decode_programs: int = 8 * NUM_MULTIPROCESSORS
    """Programs that decodes are cut into: two run at a time on a multiprocessor, more rounds leave less of the last."""
    min_item_chunks: int = 4
    """Chunks of an item that is not the only one of its sequence, so that the merge stays small."""
    decode_chunk_tokens: int = DECODE_CHUNK_TOKENS
    """Keys of one turn of the decode kernel, 64 or 128: a multiple or a whole fraction of the block size."""
    programs_per_multiprocessor: int = 2
    """Programs of the decode kernel that share a multiprocessor's memory: one computes while another waits."""
    max_decode_stages: int = MAX_STAGES
    """Chunks of a decode that are on their way at once, where a program's share of that memory has room for them."""
    is_interpreted: bool = False
    """Whether jax's GPU interpreter runs them, which lacks an instruction."""


def default_launch() -> Launch:
    """The launch where nothing was tuned: by the number of multiprocessors of the device that is traced for."""
    count = target_num_multiprocessors() or NUM_MULTIPROCESSORS
    return Launch(num_multiprocessors=count, decode_programs=8 * count)


def launch_for(shape: ShapeClass) -> Launch:
    """The launch as it was tuned for the device that is traced for, or the default."""
    tuned: Mapping[str, Any] = tuned_sizes(shape).launch
    return replace(default_launch(), **tuned)


def _attend_decodes(
    shape: KernelShape, launch: Launch, query: Float[Array, "tokens q_heads lanes"], kv: Cache,
    metadata: AttentionMetadata, sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "seqs q_heads lanes"]:  # fmt: skip
    """Outputs of the decodes; those of other sequences are anything."""
    num_seqs = metadata.context_lens.shape[0]
    lens = jnp.where(jnp.arange(num_seqs) < metadata.num_decodes, metadata.context_lens, 0)
    num_items = -(-launch.decode_programs // shape.num_kv_heads)
    items = cut_into_items(
        lens, shape.chunk, shape.window, num_items=num_items, min_chunks=launch.min_item_chunks
    )
    # a decode sequence is the token of its own number
    rows = query[:num_seqs]
    rows = jnp.pad(rows, ((0, num_seqs - rows.shape[0]), (0, 0), (0, 0)))
    padding = (0, shape.group_rows - shape.group)
    rows = rows.reshape(num_seqs, shape.num_kv_heads, shape.group, shape.lanes)
    outputs, sums = attend_decodes(
        shape, jnp.pad(rows, ((0, 0), (0, 0), padding, (0, 0))), kv, metadata.block_tables, lens,
        items.sequences, items.first_chunks, items.end_chunks, items.first_items[-1:],
    )  # fmt: skip
    if sinks is None:
        sink_rows = jnp.full((shape.num_kv_heads, shape.group_rows), MASKED, jnp.float32)
    else:
        by_head = sinks.astype(jnp.float32).reshape(shape.num_kv_heads, shape.group) * LOG2_E
        sink_rows = jnp.pad(by_head, ((0, 0), padding))
    sink_rows = jnp.broadcast_to(sink_rows[..., None], (*sink_rows.shape, shape.lanes))
    merged = merge_items(shape, outputs, sums, sink_rows, items.first_items)
    return merged[:, :, : shape.group].reshape(num_seqs, -1, shape.lanes)


def _attend_tiles(
    shape: KernelShape, launch: Launch, query: Float[Array, "tokens q_heads lanes"], kv: Cache,
    metadata: AttentionMetadata, sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "tokens q_heads lanes"]:  # fmt: skip
    """Outputs of the tokens of all tiles; those of other tokens are anything."""
    num_tokens = query.shape[0]
    tiles = TileShape(tile_size=metadata.tile_size, num_tokens=max(num_tokens, ROWS), group=shape.group)
    query = jnp.pad(query, ((0, tiles.num_tokens - num_tokens), (0, 0), (0, 0)))
    sequences, starts = metadata.tile_sequences, metadata.tile_starts
    positions = metadata.context_lens[sequences] - metadata.query_starts[sequences + 1] + starts
    shape = shape.for_tiles(tiles.compute_warpgroups)
    attended = attend_tiles(
        shape, tiles, launch.num_multiprocessors, query, kv, sinks, metadata.block_tables, sequences, starts,
        positions, metadata.tile_lens, metadata.num_tiles[None],
    )  # fmt: skip
    # the tile of a token: the last one that does not start behind it
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slots = jnp.arange(starts.shape[0])
    used_starts = jnp.where(slots < metadata.num_tiles, starts, num_tokens)
    tile = jnp.maximum((used_starts <= token[:, None]).sum(1, dtype=jnp.int32) - 1, 0)
    return attended.at[output_row(tiles, tile, starts[tile], token)].get(mode="clip")


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
    """The op as `api.paged_attention` defines it. Queries are rounded to bfloat16, which holds keys and values.

    `launch` None takes `launch_for`.
    """
    num_tokens, num_q_heads, head_dim = query.shape
    kv = write(kv, key, value, metadata.slot_mapping)
    dtype, (_, num_kv_heads, block_size, lanes) = kv[0].dtype, kv[0].shape
    group = num_q_heads // num_kv_heads
    if launch is None:
        launch = launch_for(
            ShapeClass(
                implementation="mosaic_gpu", dtype=dtype.name, head_dim=head_dim, block_size=block_size,
                num_kv_heads=num_kv_heads, group=group,
            )  # fmt: skip
        )
    rows = pad_lanes(query.astype(jnp.bfloat16), dtype, jnp)
    shape = KernelShape(
        num_kv_heads=num_kv_heads,
        group=group,
        lanes=lanes,
        block_size=block_size,
        chunk=launch.decode_chunk_tokens,
        stages=0,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        stored=dtype,
        is_interpreted=launch.is_interpreted,
    )
    decode_shape = shape.for_decodes(SMEM_BYTES // launch.programs_per_multiprocessor, launch.max_decode_stages)
    decoded = _attend_decodes(decode_shape, launch, rows, kv, metadata, sinks)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    decoded = decoded.at[token].get(mode="clip")
    if metadata.tile_sequences.shape[0]:
        shape = replace(shape, chunk=tile_chunk_tokens(head_dim, dtype, soft_cap is not None))
        tiled = _attend_tiles(shape, launch, rows, kv, metadata, sinks)
    else:
        tiled = jnp.zeros_like(decoded)
    token = token[:, None, None]
    output = jnp.where(token < metadata.num_decodes, decoded, tiled.astype(decoded.dtype))
    output = jnp.where(token < metadata.query_starts[-1], output, 0.0)
    return output[..., :head_dim].astype(query.dtype), kv
