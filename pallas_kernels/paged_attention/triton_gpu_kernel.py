"""The kernels of triton_gpu.py: decodes, the merge of their items, and tiles.

Keys are read row by row at the addresses that the block table gives, so a block may have any size. Nothing is masked
when it is read or written, as jax's interpreter cannot do that: instead an index past the end is that of the last row
that counts. So a stale key or value is never read, and rows past the end repeat the last row and store what it stores.
All exponentials are powers of two: scores carry a factor log2(e). Bytes are made bfloat16 where they are used, float8
from its bits (uint8); their scales go on scores and on weights.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.paged_attention.gpu_items import Items
from pallas_kernels.paged_attention.mosaic_gpu_layout import Cache
from pallas_kernels.paged_attention.triton_gpu_layout import pieces

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that is not seen; finite, so that a row that has seen none yet has differences that are numbers."""
MIN_ROWS = 16
"""Query rows of the smallest matrix product."""
MAX_TURN_BYTES = 128
"""Of a column of query rows, and of keys of a turn: 64 in bfloat16, 32 in float32, whose sums take more registers."""
STAGE_BYTES = 32 * 1024
"""Of keys and values of a turn. The smallest GPUs have 99 KiB of shared memory, which holds the turns under way."""
MERGED_AT_ONCE = 16
"""Items whose outputs the merge has in flight."""

Ref = Any


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How kernels are run. The defaults are guesses that no measurement has tuned."""

    decode_programs: int = 1024
    """Programs that decodes are cut into, over all heads: several rounds on each multiprocessor of a large GPU."""
    min_item_chunks: int = 4
    """Chunks of an item that is not the only one of its sequence, so that the merge stays small."""
    num_stages: int = 3
    """Turns under way: reading block ids, reading keys and values, computing."""
    decode_turn_tokens: int | None = None
    """Keys of a turn of decodes, a power of two; None for as many as `KernelShape.chunk` says."""
    decode_warps: int | None = None
    """Warps of a program of decodes, a power of two; None for as many as `KernelShape.num_warps` says."""
    is_interpreted: bool = False
    """Whether jax's interpreter runs them, on any device."""

    def options(self, num_warps: int = 4) -> dict[str, Any]:
        """Keywords of `pallas_call`. What a GPU's default backend is has changed with jax: so it is always named."""
        params = pltriton.CompilerParams(num_warps=num_warps, num_stages=self.num_stages)
        return {"compiler_params": params, "interpret": self.is_interpreted}


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What is static in a kernel."""

    num_kv_heads: int
    group: int
    """Query heads of a key-value head."""
    lanes: int
    """Head dim, padded."""
    block_size: int
    dtype: jnp.dtype
    """Of the matrices that are multiplied: that of the cache, or bfloat16, in which stored bytes are exact."""
    is_quantized: bool
    """Whether it is the latter."""
    scale: float
    window: int | None
    soft_cap: float | None
    turn_tokens: int | None = None
    """Keys of a turn; None for as many as fit."""

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        return pieces(self.lanes)

    @property
    def chunk(self) -> int:
        """Keys of a turn, a power of two."""
        if self.turn_tokens is not None:
            return self.turn_tokens
        row_bytes = 2 * max(self.lanes, MIN_ROWS) * self.dtype.itemsize
        return min(1 << ((STAGE_BYTES // row_bytes).bit_length() - 1), MAX_TURN_BYTES // self.dtype.itemsize)

    def rows(self, wanted: int) -> int:
        """Query rows of a program that is to have `wanted`: a power of two."""
        return min(max(1 << (wanted - 1).bit_length(), MIN_ROWS), MAX_TURN_BYTES // self.dtype.itemsize)

    @property
    def num_warps(self) -> int:
        """Of a program; more have more registers for the sums of long rows, and for bytes on their way to bfloat16."""
        return 4 if self.lanes * self.dtype.itemsize <= (128 if self.is_quantized else 256) else 8


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weighted", "highest", "total"), meta_fields=()
)
@dataclass(frozen=True)
class Partial:
    """A softmax under way, for each row."""

    weighted: tuple[Float[Array, "rows lanes"], ...]
    """Sum of 2 ** (score - highest) * value, in pieces."""
    highest: Float[Array, "rows"]
    total: Float[Array, "rows"]
    """Sum of 2 ** (score - highest)."""


def nothing(shape: KernelShape, rows: int) -> Partial:
    """The softmax of no keys."""
    return Partial(
        tuple(jnp.zeros((rows, size), jnp.float32) for _, size in shape.pieces),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )


def multiply(left: Array, right: Array, contracted: int) -> Float[Array, "rows columns"]:
    """The product over axis `contracted` of `right`, summed in float32, of float32 in full precision."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def as_factor(shape: KernelShape, stored: Shaped[Array, "chunk lanes"]) -> Array:
    """Keys or values in the dtype that is multiplied."""
    return (decode_float8(stored) if stored.dtype == jnp.uint8 else stored).astype(shape.dtype)


def decode_float8(bits: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """What float8_e4m3fn of these bits (uint8) is, NaN apart. By whole numbers: GPUs before 8.9 know no such type."""
    word = bits.astype(jnp.int32)
    magnitude = (word & 0x7F) << 20  # exponent and fraction, where float32 has the last 4 bits of the one and its own
    small = as_float(magnitude + (121 << 23)) - 2.0**-6  # without an exponent, fractions are eighths of 2 ** -6
    value = jnp.where((word & 0x78) == 0, small, as_float(magnitude + (120 << 23)))
    return jnp.where(word < 0x80, value, -value)


def as_float(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def add_chunk(
    shape: KernelShape,
    before: Partial,
    queries: tuple[Float[Array, "rows lanes"], ...],
    kv: Cache,
    blocks: Int[Array, "chunk"],
    head: Array,
    offsets: Int[Array, "chunk"],
    is_seen: Bool[Array, "#rows chunk"],
) -> Partial:
    """`before` and the keys at `offsets` of `blocks`: the online softmax of FlashAttention (Dao et al. 2022, 3.1)."""
    keys, values, *scales = kv
    scores = functools.reduce(
        jnp.add,
        [
            multiply(query, as_factor(shape, keys[blocks, head, offsets, pl.ds(*piece)]), 1)
            for query, piece in zip(queries, shape.pieces, strict=True)
        ],
    )
    factor = shape.scale * LOG2_E * (1.0 if shape.soft_cap is None else 2.0 / shape.soft_cap)
    scores = scores * ((scales[0][blocks, head, offsets] * factor)[None, :] if scales else factor)
    if shape.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): CUDA's own has branches, and the registers they took were spilled
        scores = shape.soft_cap * LOG2_E - (2.0 * LOG2_E * shape.soft_cap) / (jnp.exp2(scores) + 1.0)
    scores = jnp.where(is_seen, scores, MASKED)
    highest = jnp.maximum(before.highest, scores.max(axis=1))
    shrink = jnp.exp2(before.highest - highest)
    weights = jnp.exp2(scores - highest[:, None])
    total = before.total * shrink + weights.sum(axis=1)
    if scales:
        weights = weights * scales[1][blocks, head, offsets][None, :]
    weights = weights.astype(shape.dtype)
    weighted = tuple(
        sums * shrink[:, None] + multiply(weights, as_factor(shape, values[blocks, head, offsets, pl.ds(*piece)]), 0)
        for sums, piece in zip(before.weighted, shape.pieces, strict=True)
    )
    return Partial(weighted, highest, total)


def read_pieces(shape: KernelShape, source: Ref, *index: Any) -> tuple[Array, ...]:
    return tuple(source[(*index, pl.ds(*piece))] for piece in shape.pieces)


def write_pieces(shape: KernelShape, target: Ref, index: tuple[Any, ...], arrays: tuple[Array, ...]) -> None:
    for array, piece in zip(arrays, shape.pieces, strict=True):
        target[(*index, pl.ds(*piece))] = array.astype(target.dtype)


def address(
    shape: KernelShape, tables: Ref, sequence: Array, positions: Int[Array, "chunk"]
) -> tuple[Int[Array, "chunk"], Int[Array, "chunk"]]:
    """Block ids, and places in them, of a sequence's positions."""
    blocks = tables[sequence, lax.div(positions, jnp.int32(shape.block_size))]
    return blocks, lax.rem(positions, jnp.int32(shape.block_size))


# -- decodes


def heads_of_rows(shape: KernelShape, head: Array, part: Array, rows: int) -> Int[Array, "rows"]:
    """Query heads of a program's rows. Those past the group's end are its last head again: never another program's."""
    row = part * rows + jnp.arange(rows, dtype=jnp.int32)
    return head * shape.group + jnp.minimum(row, shape.group - 1)


def attend_decodes(
    shape: KernelShape,
    launch: Launch,
    queries: Float[Array, "tokens q_heads lanes"],
    kv: Cache,
    block_tables: Int[Array, "seqs blocks_per_seq"],
    context_lens: Int[Array, "seqs"],
    items: Items,
) -> tuple[Float[Array, "items q_heads lanes"], Float[Array, "items q_heads"], Float[Array, "items q_heads"]]:
    """The partial softmax of each item: weighted sum of values, highest score and sum of weights.

    A program attends query heads of one key-value head to one item. What is past the last item stays as it was.
    """
    num_items, num_q_heads = items.sequences.shape[0], queries.shape[1]
    rows = shape.rows(shape.group)

    def body(
        queries: Ref, kv: Cache, tables: Ref, lens: Ref, sequences: Ref, first_chunks: Ref, end_chunks: Ref,
        first_items: Ref, weighted: Ref, highest: Ref, total: Ref,
    ) -> None:  # fmt: skip
        item, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)

        @pl.when(item < first_items[first_items.shape[0] - 1])
        def _attend() -> None:
            sequence = sequences[item]
            length = lens[sequence]
            first_seen = jnp.int32(0) if shape.window is None else jnp.maximum(length - shape.window, 0)
            q_heads = heads_of_rows(shape, head, part, rows)
            query = read_pieces(shape, queries, sequence, q_heads)

            def turn(index: Array, before: Partial) -> Partial:
                column = index * shape.chunk + jnp.arange(shape.chunk, dtype=jnp.int32)
                position = jnp.clip(column, first_seen, length - 1)
                blocks, offsets = address(shape, tables, sequence, position)
                is_seen = (column == position)[None, :]
                return add_chunk(shape, before, query, kv, blocks, head, offsets, is_seen)

            partial = lax.fori_loop(first_chunks[item], end_chunks[item], turn, nothing(shape, rows))
            write_pieces(shape, weighted, (item, q_heads), partial.weighted)
            highest[item, q_heads] = partial.highest
            total[item, q_heads] = partial.total

    by_head = jax.ShapeDtypeStruct((num_items, num_q_heads), jnp.float32)
    return pl.pallas_call(
        body,
        out_shape=(jax.ShapeDtypeStruct((num_items, num_q_heads, shape.lanes), jnp.float32), by_head, by_head),
        grid=(num_items, shape.num_kv_heads, -(-shape.group // rows)),
        name="attend_decodes",
        **launch.options(launch.decode_warps or shape.num_warps),
    )(queries, kv, block_tables, context_lens, *items)


def merge_items(
    shape: KernelShape,
    launch: Launch,
    weighted: Float[Array, "items q_heads lanes"],
    highest: Float[Array, "items q_heads"],
    total: Float[Array, "items q_heads"],
    sinks: Float[Array, "q_heads"],
    first_items: Int[Array, "seqs_plus_1"],
    outputs: Float[Array, "tokens q_heads lanes"],
) -> Float[Array, "tokens q_heads lanes"]:
    """`outputs` with the rows of the decodes: the sum of their items by the share of their weights; sinks take theirs.

    Sequence i is token i. Sinks are times log2(e).
    """

    def body(
        weighted: Ref, highest: Ref, total: Ref, sinks: Ref, first_items: Ref, _: Ref, outputs: Ref
    ) -> None:
        sequence, head = pl.program_id(0), pl.program_id(1)
        first, end = first_items[sequence], first_items[sequence + 1]

        def turn(index: Array, before: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            sums, sum_highest, sum_total = before
            item = first + index * MERGED_AT_ONCE + jnp.arange(MERGED_AT_ONCE, dtype=jnp.int32)
            mine = jnp.minimum(item, end - 1)
            scores = jnp.where(item < end, highest[mine, head], MASKED)
            common = jnp.maximum(sum_highest, scores.max())
            shrink = jnp.exp2(sum_highest - common)
            shares = jnp.exp2(scores - common)
            parts = read_pieces(shape, weighted, mine, head)
            sums = tuple(
                sum_ * shrink + (part * shares[:, None]).sum(axis=0)
                for sum_, part in zip(sums, parts, strict=True)
            )
            return sums, common, sum_total * shrink + (total[mine, head] * shares).sum()

        @pl.when(first < end)
        def _merge() -> None:
            zeros = tuple(jnp.zeros((size,), jnp.float32) for _, size in shape.pieces)
            num_turns = lax.div(end - first + (MERGED_AT_ONCE - 1), jnp.int32(MERGED_AT_ONCE))
            sums, _, sum_total = lax.fori_loop(0, num_turns, turn, (zeros, sinks[head], jnp.float32(1.0)))
            write_pieces(shape, outputs, (sequence, head), tuple(sum_ / sum_total for sum_ in sums))

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
        grid=(first_items.shape[0] - 1, outputs.shape[1]),
        input_output_aliases={5: 0},
        name="merge_items",
        **launch.options(),
    )(weighted, highest, total, sinks, first_items, outputs)


# -- tiles


def attend_tiles(
    shape: KernelShape,
    launch: Launch,
    tile_size: int,
    queries: Float[Array, "tokens q_heads lanes"],
    kv: Cache,
    sinks: Float[Array, "q_heads"],
    block_tables: Int[Array, "seqs blocks_per_seq"],
    tile_sequences: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_positions: Int[Array, "tiles"],
    tile_lens: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
    outputs: Float[Array, "tokens q_heads lanes"],
) -> Float[Array, "tokens q_heads lanes"]:
    """`outputs` with the rows of the tokens of all tiles.

    A program has the query rows, tokens by heads, of a part of a tile for one key-value head, so that heads that share
    keys read them once. `tile_positions` are those of the tiles' first tokens; sinks are times log2(e).
    """
    rows = shape.rows(tile_size * shape.group)
    parts = -(-tile_size * shape.group // rows)

    def body(
        queries: Ref, kv: Cache, sinks: Ref, tables: Ref, sequences: Ref, starts: Ref, positions: Ref, lens: Ref,
        num_tiles: Ref, _: Ref, outputs: Ref,
    ) -> None:  # fmt: skip
        # late tiles of a sequence come first, as they see most
        program = pl.program_id(0)
        tile = num_tiles[0] - 1 - lax.div(program, jnp.int32(parts * shape.num_kv_heads))

        @pl.when(tile >= 0)
        def _attend() -> None:
            head = lax.rem(lax.div(program, jnp.int32(parts)), jnp.int32(shape.num_kv_heads))
            first_row = lax.rem(program, jnp.int32(parts)) * rows
            num_rows = lens[tile] * shape.group

            @pl.when(first_row < num_rows)
            def _attend_part() -> None:
                sequence, start, position = sequences[tile], starts[tile], positions[tile]
                row = jnp.minimum(first_row + jnp.arange(rows, dtype=jnp.int32), num_rows - 1)
                token = lax.div(row, jnp.int32(shape.group))
                q_heads = head * shape.group + lax.rem(row, jnp.int32(shape.group))
                row_position = position + token
                last_row = jnp.minimum(first_row + rows, num_rows) - 1
                end = position + lax.div(last_row, jnp.int32(shape.group)) + 1
                first_seen = jnp.int32(0)
                if shape.window is not None:
                    first_position = position + lax.div(first_row, jnp.int32(shape.group))
                    first_seen = jnp.maximum(first_position - (shape.window - 1), 0)
                query = read_pieces(shape, queries, start + token, q_heads)

                def turn(index: Array, before: Partial) -> Partial:
                    column = index * shape.chunk + jnp.arange(shape.chunk, dtype=jnp.int32)
                    is_seen = column[None, :] <= row_position[:, None]
                    if shape.window is not None:
                        is_seen &= column[None, :] > row_position[:, None] - shape.window
                    blocks, offsets = address(shape, tables, sequence, jnp.clip(column, first_seen, end - 1))
                    return add_chunk(shape, before, query, kv, blocks, head, offsets, is_seen)

                chunk = jnp.int32(shape.chunk)
                first_chunk, end_chunk = lax.div(first_seen, chunk), lax.div(end + (chunk - 1), chunk)
                partial = lax.fori_loop(first_chunk, end_chunk, turn, nothing(shape, rows))
                sink = sinks[q_heads]
                common = jnp.maximum(partial.highest, sink)
                shrink = jnp.exp2(partial.highest - common)
                total = partial.total * shrink + jnp.exp2(sink - common)
                factor = (shrink / total)[:, None]
                write_pieces(
                    shape, outputs, (start + token, q_heads), tuple(sums * factor for sums in partial.weighted)
                )

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
        grid=(tile_sequences.shape[0] * shape.num_kv_heads * parts,),
        input_output_aliases={8 + len(kv): 0},
        name="attend_tiles",
        **launch.options(shape.num_warps),
    )(
        queries, kv, sinks, block_tables, tile_sequences, tile_starts, tile_positions, tile_lens, num_tiles, outputs
    )  # fmt: skip
