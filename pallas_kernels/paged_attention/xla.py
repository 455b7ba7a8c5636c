"""Paged attention in plain XLA, made for CPU: dynamic loops over work that is there, online softmax, float32.

Layer cache: keys [blocks, kv_heads, head_dim, block_size] and values [blocks, kv_heads, block_size, head_dim]. With the
tokens of a key block as the minor axis, both products of a chunk are row-major matrix products. bfloat16 is stored as
its bits (uint16), because jaxlib 0.10.2 rewrites a whole bfloat16 array for every scatter on CPU, and float8_e4m3fn as
its own (uint8). A quantized cache has float32 scales of keys and of values behind, each [blocks, kv_heads, block_size].

Two loops, both with dynamic trip counts, so that padding costs nothing:

    decodes   the chunks of all decode sequences form one list; a turn takes the next few of them, whichever
              sequences they belong to, and merges the partial softmaxes (only one sequence can be open between turns)
    tiles     one tile of up to tile_size tokens after the other, each over its chunks of key_chunk_tokens keys

In the second loop nothing that reaches a row depends on what else is in the tile or the batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.quantization import Quantized, is_quantized, quantize

DECODE_CHUNK_TOKENS = 64
"""Keys of one decode item, rounded to whole blocks."""
MIN_DECODE_ITEMS, MAX_DECODE_ITEMS = 4, 16
"""Decode items per turn: as many as there are sequences, within these."""
DECODE_TURN_ELEMENTS = 512 * 1024
"""Most key elements gathered per turn (2 MiB, and as much for values): more falls out of the caches."""
MASKED = -1e30
"""Score of a key that is not seen: finite, so that a difference of two of them is 0 and not NaN."""

Keys = Shaped[Array, "blocks kv_heads head_dim block_size"]
Values = Shaped[Array, "blocks kv_heads block_size head_dim"]
Scales = Float[Array, "blocks kv_heads block_size"]
PlainCache = tuple[Keys, Values]
Cache = PlainCache | tuple[Keys, Values, Scales, Scales]

BITS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8)}
"""How dtypes are stored that are not stored as themselves."""
LOGICAL = {bits: dtype for dtype, bits in BITS.items()}


def _stored(dtype: jnp.dtype) -> jnp.dtype:
    return BITS.get(dtype, dtype)


def cache_shapes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of a layer cache."""
    scales = jax.ShapeDtypeStruct((num_blocks, num_kv_heads, block_size), jnp.float32)
    return (
        jax.ShapeDtypeStruct((num_blocks, num_kv_heads, head_dim, block_size), _stored(dtype)),
        jax.ShapeDtypeStruct((num_blocks, num_kv_heads, block_size, head_dim), _stored(dtype)),
        *([scales, scales] if is_quantized(dtype) else []),
    )


def pack(key: Any, value: Any) -> tuple[np.ndarray, ...]:
    """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
    if isinstance(key, Quantized):
        scales = (np.ascontiguousarray(heads.scales.transpose(0, 2, 1)) for heads in (key, value))
        return *pack(key.stored, value.stored), *scales
    dtype = _stored(key.dtype)
    keys = np.ascontiguousarray(key.transpose(0, 2, 3, 1))
    values = np.ascontiguousarray(value.transpose(0, 2, 1, 3))
    return keys.view(dtype), values.view(dtype)


def unpack(kv: tuple[np.ndarray, ...], num_kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache."""
    keys, values, *scales = kv
    dtype = LOGICAL.get(keys.dtype, keys.dtype)
    key, value = keys.view(dtype).transpose(0, 3, 1, 2), values.view(dtype).transpose(0, 2, 1, 3)
    if not scales:
        return key, value
    key_scales, value_scales = (array.transpose(0, 2, 1) for array in scales)
    return Quantized(key, key_scales), Quantized(value, value_scales)


def encode(array: Array, stored: jnp.dtype) -> Array:
    """`array` as it is stored."""
    if stored in LOGICAL:
        return lax.bitcast_convert_type(array.astype(LOGICAL[stored]), stored)
    return array.astype(stored)


def _decode(array: Array) -> Array:
    """A stored array as float32."""
    if array.dtype in LOGICAL:
        array = lax.bitcast_convert_type(array, LOGICAL[array.dtype])
    return array.astype(jnp.float32)


def write(kv: Cache, key: Array, value: Array, slot_mapping: Int[Array, "tokens"]) -> Cache:
    """The cache with each token's key and value in its slot. Padding tokens share slot 0: no unique_indices here."""
    keys, values, *scales = kv
    block_size = keys.shape[-1]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    if not scales:
        keys = keys.at[blocks, :, :, offsets].set(encode(key, keys.dtype))
        return keys, values.at[blocks, :, offsets, :].set(encode(value, values.dtype))
    key_scales, value_scales = scales
    logical = LOGICAL.get(keys.dtype, keys.dtype)
    key, new_key_scales = quantize(key, logical, jnp)
    value, new_value_scales = quantize(value, logical, jnp)
    keys = keys.at[blocks, :, :, offsets].set(encode(key, keys.dtype))
    values = values.at[blocks, :, offsets, :].set(encode(value, values.dtype))
    key_scales = key_scales.at[blocks, :, offsets].set(new_key_scales)
    value_scales = value_scales.at[blocks, :, offsets].set(new_value_scales)
    return keys, values, key_scales, value_scales


class _Chunk(NamedTuple):
    """Keys and values of each item's blocks, contiguous, as float32. What is not used does no harm in `values`."""

    keys: Float[Array, "items kv_heads head_dim keys"]
    values: Float[Array, "items kv_heads keys head_dim"]
    key_scales: Float[Array, "items kv_heads keys"] | None = None
    value_scales: Float[Array, "items kv_heads keys"] | None = None
    """0 where a key is not used."""


def _gather(kv: Cache, ids: Int[Array, "items item_blocks"], is_used: Bool[Array, "items keys"]) -> _Chunk:
    """The chunk of each item's blocks.

    Whatever a value is, 0 * NaN is NaN: so an unused value is cleared here, an unused score later. Of a quantized cache
    only scales can be NaN.
    """
    keys, values, *scales = kv
    _, num_kv_heads, head_dim, block_size = keys.shape
    num_items, num_blocks = ids.shape
    ids = jnp.where(is_used.reshape(num_items, num_blocks, block_size).any(-1), ids, 0)
    gathered = keys.at[ids].get(mode="promise_in_bounds")
    gathered = gathered.transpose(0, 2, 3, 1, 4).reshape(num_items, num_kv_heads, head_dim, -1)
    # one (block, head) slab a row: XLA's CPU gather copies long rows at twice the speed of [block_size, head_dim] ones
    slabs = values.reshape(-1, block_size * head_dim)
    rows = ids[:, None, :] * num_kv_heads + jnp.arange(num_kv_heads)[:, None]
    gathered_values = slabs.at[rows].get(mode="promise_in_bounds").reshape(num_items, num_kv_heads, -1, head_dim)
    if not scales:
        return _Chunk(_decode(gathered), jnp.where(is_used[:, None, :, None], _decode(gathered_values), 0.0))
    key_scales, value_scales = (
        leaf.at[ids].get(mode="promise_in_bounds").swapaxes(1, 2).reshape(num_items, num_kv_heads, -1)
        for leaf in scales
    )
    value_scales = jnp.where(is_used[:, None], value_scales, 0.0)
    return _Chunk(_decode(gathered), _decode(gathered_values), key_scales, value_scales)


def _varying_axes(array: Any) -> frozenset[Any]:
    return jax.typeof(array).manual_axis_type.varying


def _varying_like(start: Any, *operands: Any) -> Any:
    """What a loop starts with, of the type that it has after a turn with `operands`.

    Inside a shard_map that tells over what axes of the mesh devices may hold different numbers; elsewhere nothing.
    """
    axes: frozenset[Any] = frozenset().union(*map(_varying_axes, jax.tree.leaves(operands)))
    return jax.tree.map(
        lambda leaf: lax.pcast(leaf, tuple(sorted(axes - _varying_axes(leaf), key=str)), to="varying"), start
    )


class _Partial(NamedTuple):
    """A softmax under way, for any leading axes."""

    weighted: Float[Array, "... head_dim"]
    """Sum of exp(score - highest) * value."""
    highest: Float[Array, "..."]
    total: Float[Array, "..."]
    """Sum of exp(score - highest)."""


def _score(
    query: Float[Array, "items kv_heads rows head_dim"],
    chunk: _Chunk,
    is_seen: Bool[Array, "items #rows keys"],
    soft_cap: float | None,
) -> Float[Array, "items kv_heads rows keys"]:
    """Scores of one chunk of each item, MASKED where a key is not seen."""
    scores = jnp.einsum("ihrd,ihdk->ihrk", query, chunk.keys, preferred_element_type=jnp.float32)
    if chunk.key_scales is not None:
        scores = scores * chunk.key_scales[:, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(is_seen[:, None], scores, MASKED)


def _weigh(
    scores: Float[Array, "items kv_heads rows keys"],
    chunk: _Chunk,
    is_seen: Bool[Array, "items #rows keys"],
    highest: Float[Array, "items kv_heads rows"],
) -> _Partial:
    """The partial softmax of one chunk of each item, relative to `highest`."""
    # the second mask is for a row that has not seen a key yet: there MASKED - highest is 0
    weights = jnp.where(is_seen[:, None], jnp.exp(scores - highest[..., None]), 0.0)
    scaled = weights if chunk.value_scales is None else weights * chunk.value_scales[:, :, None]
    weighted = jnp.einsum("ihrk,ihkd->ihrd", scaled, chunk.values, preferred_element_type=jnp.float32)
    return _Partial(weighted, highest, weights.sum(-1))


def _finish(partial: _Partial, sinks: Float[Array, "..."] | None) -> Float[Array, "... head_dim"]:
    """The attention output; sinks take their part of the total."""
    weighted, highest, total = partial
    if sinks is not None:
        common = jnp.maximum(highest, sinks)
        shrink = jnp.exp(highest - common)
        weighted, total = weighted * shrink[..., None], total * shrink + jnp.exp(sinks - common)
    return weighted / jnp.where(total == 0.0, 1.0, total)[..., None]


def _sum_by_sequence(partials: _Partial, is_same: Bool[Array, "items items"]) -> _Partial:
    """For each item, the sum over the items of its sequence; all of them relative to the same maximum.

    A product with a matrix of zeros and ones, which would carry one sequence's NaN to all others: so what is not
    finite is taken out before, and its sequence (and head) is NaN after.
    """
    weighted, highest, total = partials
    is_finite = jnp.isfinite(weighted).all(-1)
    clean = jnp.where(is_finite[..., None], weighted, 0.0)
    summed = (is_same.astype(jnp.float32) @ clean.reshape(clean.shape[0], -1)).reshape(clean.shape)
    mates = is_same[:, :, None, None]
    is_finite = (is_finite | ~mates).all(1)
    summed = jnp.where(is_finite[..., None], summed, jnp.nan)
    return _Partial(summed, highest, jnp.where(mates, total, 0.0).sum(1))


def _num_decode_items(num_seqs: int, item_elements: int) -> int:
    """Items per turn, a power of two."""
    wanted = min(max(num_seqs, MIN_DECODE_ITEMS), MAX_DECODE_ITEMS, max(DECODE_TURN_ELEMENTS // item_elements, 1))
    return 1 << (wanted.bit_length() - 1)


def _attend_decodes(
    query: Float[Array, "tokens q_heads head_dim"],
    kv: Cache,
    metadata: AttentionMetadata,
    output: Float[Array, "rows q_heads head_dim"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "rows q_heads head_dim"]:
    """`output` with the rows of the decode tokens filled in; its last row is scratch."""
    num_kv_heads, head_dim, block_size = kv[0].shape[1:]
    num_seqs, blocks_per_seq = metadata.block_tables.shape
    group = query.shape[1] // num_kv_heads
    chunk_blocks = max(1, DECODE_CHUNK_TOKENS // block_size)
    chunk = chunk_blocks * block_size
    items_per_turn = _num_decode_items(num_seqs, chunk * num_kv_heads * head_dim)
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, -blocks_per_seq % chunk_blocks)))
    tables = tables.reshape(num_seqs, -1, chunk_blocks)
    head_sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(num_kv_heads, -1)

    # the list of items: sequence after sequence, chunk after chunk
    lens = jnp.where(jnp.arange(num_seqs) < metadata.num_decodes, metadata.context_lens, 0)
    first_keys = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0)
    first_chunks = first_keys // chunk
    num_chunks = -(-lens // chunk) - jnp.where(lens > 0, first_chunks, 0)
    ends = jnp.cumsum(num_chunks)
    starts, num_items = ends - num_chunks, ends[-1]

    def turn(index: Array, carry: tuple[Array, _Partial, Array]) -> tuple[Array, _Partial, Array]:
        output, pending, pending_sequence = carry
        items = index * items_per_turn + jnp.arange(items_per_turn)
        is_item = items < num_items
        sequences = jnp.minimum((ends <= items[:, None]).sum(1, dtype=jnp.int32), num_seqs - 1)
        chunks = jnp.where(is_item, first_chunks[sequences] + items - starts[sequences], 0)
        positions = chunks[:, None] * chunk + jnp.arange(chunk)
        is_seen = (positions < lens[sequences][:, None]) & is_item[:, None]
        if window is not None:
            is_seen &= positions >= first_keys[sequences][:, None]
        keys = _gather(kv, tables[sequences, chunks], is_seen)
        rows = query[sequences].astype(jnp.float32).reshape(-1, num_kv_heads, group, head_dim) * scale
        scores = _score(rows, keys, is_seen[:, None], soft_cap)
        # the sequence left open by the turn before joins as item 0; items that are none are sequence -1
        sequences = jnp.concatenate([pending_sequence[None], jnp.where(is_item, sequences, -1)])
        is_same = sequences[:, None] == sequences
        highest = jnp.concatenate([pending.highest[None], scores.max(-1)])
        common = jnp.where(is_same[:, :, None, None], highest, MASKED).max(1)
        shrink = jnp.exp(pending.highest - common[0])
        partials = _weigh(scores, keys, is_seen[:, None], common[1:])
        weighted = jnp.concatenate([(pending.weighted * shrink[..., None])[None], partials.weighted])
        total = jnp.concatenate([(pending.total * shrink)[None], partials.total])
        merged = _sum_by_sequence(_Partial(weighted, common, total), is_same)
        # all items of a sequence hold the same sum; a later turn overwrites it if the sequence was not at its end
        targets = jnp.where(is_item, sequences[1:], output.shape[0] - 1)
        finished = _finish(_Partial(*(leaf[1:] for leaf in merged)), head_sinks)
        output = output.at[targets].set(finished.reshape(-1, *output.shape[1:]), mode="promise_in_bounds")
        return output, _Partial(*(leaf[-1] for leaf in merged)), sequences[-1]

    heads = (num_kv_heads, group)
    nothing = _Partial(jnp.zeros((*heads, head_dim)), jnp.full(heads, MASKED), jnp.zeros(heads))
    num_turns = -(-num_items // items_per_turn)
    return lax.fori_loop(0, num_turns, turn, _varying_like((output, nothing, jnp.int32(-1)), output))[0]


def _attend_tiles(
    query: Float[Array, "tokens q_heads head_dim"],
    kv: Cache,
    metadata: AttentionMetadata,
    output: Float[Array, "rows q_heads head_dim"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
) -> Float[Array, "rows q_heads head_dim"]:
    """`output` with the rows of the tokens of all tiles filled in."""
    num_kv_heads, head_dim, block_size = kv[0].shape[1:]
    num_q_heads, tile_size, chunk = query.shape[1], metadata.tile_size, metadata.key_chunk_tokens
    group = num_q_heads // num_kv_heads
    chunk_blocks = chunk // block_size
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, -metadata.block_tables.shape[1] % chunk_blocks)))
    num_rows = output.shape[0]
    # a tile is read and written whole, also where the tokens end within it
    query, output = (jnp.pad(rows, ((0, tile_size), (0, 0), (0, 0))) for rows in (query, output))
    row_sinks = None
    if sinks is not None:
        row_sinks = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, group), (1, tile_size))

    def attend_tile(index: Array, output: Array) -> Array:
        sequence, start = metadata.tile_sequences[index], metadata.tile_starts[index]
        context, length = metadata.context_lens[sequence], metadata.tile_lens[index]
        first = context - metadata.query_starts[sequence + 1] + start  # position of the tile's first token
        end = first + length
        # a row is (token, head within its group); all rows of a key-value head stand in one matrix
        rows = lax.dynamic_slice_in_dim(query, start, tile_size).astype(jnp.float32) * scale
        rows = rows.reshape(tile_size, num_kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        rows = rows.reshape(1, num_kv_heads, tile_size * group, head_dim)
        row_positions = jnp.repeat(first + jnp.arange(tile_size), group)

        def attend_keys(index: Array, before: _Partial) -> _Partial:
            ids = lax.dynamic_slice(tables, (sequence, index * chunk_blocks), (1, chunk_blocks))
            positions = index * chunk + jnp.arange(chunk)
            is_seen = positions <= row_positions[:, None]
            is_used = positions < end
            if window is not None:
                is_seen &= positions > row_positions[:, None] - window
                is_used &= positions > first - window
            keys = _gather(kv, ids, is_used[None])
            scores = _score(rows, keys, is_seen[None], soft_cap)
            now = _weigh(scores, keys, is_seen[None], jnp.maximum(before.highest, scores.max(-1)))
            shrink = jnp.exp(before.highest - now.highest)
            weighted = before.weighted * shrink[..., None] + now.weighted
            return _Partial(weighted, now.highest, before.total * shrink + now.total)

        heads = (1, num_kv_heads, tile_size * group)
        nothing = _Partial(jnp.zeros((*heads, head_dim)), jnp.full(heads, MASKED), jnp.zeros(heads))
        first_chunk = jnp.int32(0) if window is None else jnp.maximum(first - window + 1, 0) // chunk
        partial = lax.fori_loop(first_chunk, -(-end // chunk), attend_keys, _varying_like(nothing, output))
        tile = _finish(partial, row_sinks).reshape(num_kv_heads, tile_size, group, head_dim)
        tile = tile.transpose(1, 0, 2, 3).reshape(tile_size, num_q_heads, head_dim)
        # rows past the tile's end belong to other tokens
        old = lax.dynamic_slice_in_dim(output, start, tile_size)
        tile = jnp.where((jnp.arange(tile_size) < length)[:, None, None], tile, old)
        return lax.dynamic_update_slice_in_dim(output, tile, start, 0)

    return lax.fori_loop(0, metadata.num_tiles, attend_tile, output)[:num_rows]


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
    """The op as `api.paged_attention` defines it."""
    kv = write(kv, key, value, metadata.slot_mapping)
    num_tokens, num_q_heads, head_dim = query.shape
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    output = jnp.zeros((num_tokens + 1, num_q_heads, head_dim), jnp.float32)
    output = _varying_like(output, query, kv, metadata, sinks)
    output = _attend_decodes(query, kv, metadata, output, **options)
    if metadata.tile_sequences.shape[0]:
        # without the condition, what does not depend on the tile is done in steps that have none: its padding, and
        # where there is one tile slot, its whole loop over keys, which XLA moves out of the loop over tiles
        output = lax.cond(
            metadata.num_tiles > 0,
            lambda output: _attend_tiles(query, kv, metadata, output, **options),
            lambda output: output,
            output,
        )
    return output[:num_tokens].astype(query.dtype), kv
