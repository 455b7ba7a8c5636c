"""The Hopper kernel for chunk tiles: one warpgroup brings keys and values, one or two others attend 64 rows each.

The first also makes bfloat16 of bytes, while the others compute: these see the same matrices whatever is stored.

A *row block* is 64 tokens of one query head, read where they stand; both warpgroups take heads of one key-value head,
where there are two, and so the same keys. The programs are as many as the device has multiprocessors; each takes every
n-th piece of work, and the keys of the next are on their way while it still computes the one before.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.mosaic_gpu_chunk import (
    COMPILER_PARAMS,
    LOG2_E,
    MASKED,
    ROW_WISE,
    ROWS,
    WGMMA,
    KernelShape,
    Partial,
    Ref,
    Side,
    add_chunk,
    block_ids,
    clear_stale_rows,
    clear_stale_scales,
    column_wise,
    convert,
    load_uncoalesced,
    nothing,
    read_scales,
    row_wise,
    score,
    start_copies,
)
from pallas_kernels.paged_attention.mosaic_gpu_layout import Cache


def registers(shape: KernelShape) -> tuple[int, int]:
    """Of a thread of the two warpgroups that compute and of the one that copies, which have 504 for three together.

    Each is what compiled for an H200 without spilling, or with the least: block ids and the conversion of bytes take
    those of the one that copies, heads of more than 128 lanes those of the others.
    """
    if shape.is_quantized:
        return (184, 136) if shape.lanes <= 128 else (216, 72)
    return (232, 40) if shape.lanes <= 128 or shape.copies_per_chunk > 4 else (240, 24)


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How the rows of a tile are cut into row blocks: ROWS tokens of one query head each."""

    tile_size: int
    num_tokens: int
    """Tokens of the batch, ROWS or more."""
    group: int

    @property
    def token_blocks(self) -> int:
        return -(-self.tile_size // ROWS)

    @property
    def row_blocks(self) -> int:
        """Of a tile and a key-value head; blocks of the same tokens stand together."""
        return self.group * self.token_blocks

    @property
    def rows(self) -> int:
        """Rows of a tile in the array of outputs."""
        return self.token_blocks * ROWS

    @property
    def compute_warpgroups(self) -> int:
        return min(self.row_blocks, 2)

    @property
    def parts(self) -> int:
        """Programs' worth of row blocks in a tile."""
        return -(-self.row_blocks // self.compute_warpgroups)

    def first_token(self, start: Any, block: Any) -> Any:
        """First token that is read for token block `block` of the tile that starts at token `start`.

        ROWS tokens are read, also where the batch ends within them: then they begin earlier.
        """
        return jnp.minimum(start + block * ROWS, self.num_tokens - ROWS)


def attend_tiles(
    shape: KernelShape,
    tiles: TileShape,
    num_programs: int,
    queries: Float[Array, "tokens q_heads lanes"],
    kv: Cache,
    sinks: Float[Array, "q_heads"] | None,
    block_tables: Int[Array, "seqs blocks_per_seq"],
    tile_sequences: Int[Array, "tiles"],
    tile_starts: Int[Array, "tiles"],
    tile_positions: Int[Array, "tiles"],
    tile_lens: Int[Array, "tiles"],
    num_tiles: Int[Array, "1"],
) -> Float[Array, "tile_rows q_heads lanes"]:
    """Outputs of the tiles; that of token t of tile i is row `output_row(...)`. Rows of no token are anything.

    `tile_positions` are the positions of the tiles' first tokens.
    """
    num_warpgroups, stages, chunk = tiles.compute_warpgroups, shape.stages, shape.chunk
    compute_registers, copy_registers = registers(shape)
    output_type = jax.ShapeDtypeStruct((tile_sequences.shape[0] * tiles.rows, *queries.shape[1:]), queries.dtype)
    has_sinks = sinks is not None
    sink_array = jnp.zeros(1, jnp.float32) if sinks is None else sinks.astype(jnp.float32)

    def body(
        queries: Ref, kv: Side, sinks: Ref, tables: Ref, sequences: Ref, starts: Ref, positions: Ref, lens: Ref,
        num_tiles: Ref, outputs: Ref, *, query_buffers: Ref, key_stages: Side, value_stages: Side, key_barriers: Ref,
        value_barriers: Ref, keys_used: Ref, values_used: Ref, cleared: Ref, byte_sides: Any,
    ) -> None:  # fmt: skip
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        num_work = num_tiles[0] * (shape.num_kv_heads * tiles.parts)
        num_mine = lax.div(jnp.maximum(num_work - program, 0) + (num_programs - 1), jnp.int32(num_programs))

        def work(number: Array) -> "Work":
            return read_work(
                shape, tiles, program + number * num_programs, num_tiles, sequences, starts, positions, lens
            )

        @pl.when(warpgroup < num_warpgroups)
        def _attend() -> None:
            if num_warpgroups == 2:
                plgpu.set_max_registers(compute_registers, action="increase")
            query = query_buffers.at[warpgroup]

            def attend_work(number: Array, num_turns: Array) -> Array:
                now = work(number)
                row_block = now.part * num_warpgroups + warpgroup
                # an odd block's mate goes along on the tile's first tokens and keeps what it finds to itself
                is_block = row_block < tiles.row_blocks
                token_block = jnp.where(is_block, lax.div(row_block, jnp.int32(shape.group)), 0)
                head = now.head * shape.group + lax.rem(row_block, jnp.int32(shape.group))
                token = tiles.first_token(now.start, token_block)
                shift = now.start + token_block * ROWS - token
                # not a bulk copy: those begin at a multiple of 8 rows only
                query[...] = load_uncoalesced(queries.at[pl.ds(token, ROWS), head])
                plgpu.commit_smem()
                first_position = now.position + token_block * ROWS - shift

                def mask(index: Array, scores: Array) -> Array:
                    # the last column that a row sees: one number a row takes fewer registers than one a score
                    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_WISE)
                    last = row + (first_position - index * chunk)
                    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, chunk), 1, layout=WGMMA)
                    is_seen = column <= row_wise(last, chunk)
                    if shape.window is not None:
                        is_seen &= column > row_wise(last - shape.window, chunk)
                    return jnp.where(is_seen, scores, MASKED)

                def turn(index: Array, partial: Partial) -> Partial:
                    slot = lax.rem(num_turns + index - now.first_chunk, jnp.int32(stages))
                    plgpu.barrier_wait(key_barriers.at[slot])
                    key_scales = read_scales(key_stages[1].at[slot]) if shape.is_quantized else None
                    scores = score(shape, query, key_stages[0].at[slot], key_scales)
                    plgpu.barrier_arrive(keys_used.at[slot])
                    is_whole = (index >= now.whole_start) & (index < now.whole_end)
                    scores = lax.cond(is_whole, lambda scores: scores, lambda scores: mask(index, scores), scores)

                    def await_values(weights: Array) -> tuple[Array, Ref]:
                        if shape.is_quantized:
                            plgpu.barrier_wait(value_barriers.at[slot])
                            scales = read_scales(value_stages[1].at[slot])
                            return (weights * column_wise(scales)).astype(jnp.bfloat16), value_stages[0].at[slot]
                        weights = weights.astype(jnp.bfloat16)
                        plgpu.barrier_wait(value_barriers.at[slot])

                        @pl.when((index + 1) * chunk > now.end)
                        def _clear() -> None:
                            start = index * chunk
                            clear(value_stages[0].at[slot], now.first_key - start, now.end - start)

                        return weights, value_stages[0].at[slot]

                    partial = add_chunk(shape, partial, scores, await_values)
                    plgpu.barrier_arrive(values_used.at[slot])
                    return partial

                def clear(stage: Ref, first: Array, end: Array) -> None:
                    if num_warpgroups == 1:
                        clear_stale_rows(shape, stage, first, end)
                        return
                    # both warpgroups read what either clears
                    @pl.when(warpgroup == 0)
                    def _() -> None:
                        clear_stale_rows(shape, stage, first, end)

                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)

                partial = lax.fori_loop(now.first_chunk, now.last_chunk, turn, nothing(shape))
                weighted, total = partial.weighted, partial.total
                if has_sinks:
                    sink = sinks[head] * LOG2_E
                    common = jnp.maximum(partial.highest, sink)
                    shrink = jnp.exp2(partial.highest - common)
                    weighted = weighted * row_wise(shrink, shape.lanes)
                    total = total * shrink + jnp.exp2(sink - common)
                query[...] = (weighted / row_wise(total, shape.lanes)).astype(queries.dtype)
                plgpu.commit_smem()

                @pl.when(is_block)
                def _store() -> None:
                    output_row = now.tile * tiles.rows + token_block * ROWS
                    plgpu.copy_smem_to_gmem(query, outputs.at[pl.ds(output_row, ROWS), head])

                plgpu.wait_smem_to_gmem(0)
                return num_turns + now.last_chunk - now.first_chunk

            lax.fori_loop(0, num_mine, attend_work, jnp.int32(0))

        @pl.when(warpgroup == num_warpgroups)
        def _bring() -> None:
            if num_warpgroups == 2:
                plgpu.set_max_registers(copy_registers, action="decrease")

            sides = (
                (kv[0::2], key_stages, key_barriers, keys_used),
                (kv[1::2], value_stages, value_barriers, values_used),
            )

            def await_room(used: Ref, count: Array) -> None:
                @pl.when(count >= stages)
                def _() -> None:
                    plgpu.barrier_wait(used.at[lax.rem(count, jnp.int32(stages))])

            def bring_work(number: Array, num_turns: Array) -> Array:
                now = work(number)
                last_block = lax.div(now.end - 1, jnp.int32(shape.block_size))

                def ids_of(index: Array) -> tuple[Array, ...]:
                    return block_ids(shape, tables, now.sequence, index, now.first_key, last_block)

                def turn(index: Array, ids: tuple[Array, ...]) -> tuple[Array, ...]:
                    count = num_turns + index - now.first_chunk
                    slot = lax.rem(count, jnp.int32(stages))
                    next_ids = ids_of(index + 1)
                    for source, targets, arrived, used in sides:
                        await_room(used, count)
                        at_slot = tuple(target.at[slot] for target in targets)
                        start_copies(shape, source, at_slot, arrived.at[slot], ids, now.head, index)
                    return next_ids

                def fetch_bytes(index: Array, ids: tuple[Array, ...]) -> None:
                    slot = lax.rem(num_turns + index - now.first_chunk, jnp.int32(shape.byte_stages))
                    for (source, *_), (stored, arrived) in zip(sides, byte_sides, strict=True):
                        at_slot = tuple(stage.at[slot] for stage in stored)
                        start_copies(shape, source, at_slot, arrived.at[slot], ids, now.head, index)

                def fetch_first(index: Array, carry: None) -> None:
                    fetch_bytes(index, ids_of(index))

                def turn_of_bytes(index: Array, carry: None) -> None:
                    count = num_turns + index - now.first_chunk
                    slot = lax.rem(count, jnp.int32(stages))
                    byte_slot = lax.rem(count, jnp.int32(shape.byte_stages))
                    # a load takes less than what follows
                    next_ids = ids_of(index + shape.byte_stages)
                    for (_, targets, filled, used), (stored, arrived) in zip(sides, byte_sides, strict=True):
                        plgpu.barrier_wait(arrived.at[byte_slot])
                        await_room(used, count)
                        scales, start = read_scales(stored[1].at[byte_slot]), index * chunk
                        scales = clear_stale_scales(shape, scales, now.first_key - start, now.end - start)
                        targets[1].at[slot][...] = scales
                        convert(shape, stored[0].at[byte_slot], targets[0].at[slot])
                        plgpu.barrier_arrive(filled.at[slot])

                    @pl.when(index + shape.byte_stages < now.last_chunk)
                    def _fetch() -> None:
                        fetch_bytes(index + shape.byte_stages, next_ids)

                first, end = now.first_chunk, now.last_chunk
                if shape.is_quantized:
                    lax.fori_loop(first, jnp.minimum(first + shape.byte_stages, end), fetch_first, None)
                    lax.fori_loop(first, end, turn_of_bytes, None)
                else:
                    lax.fori_loop(first, end, turn, ids_of(first))
                return num_turns + end - first

            lax.fori_loop(0, num_mine, bring_work, jnp.int32(0))

    if shape.is_quantized:
        stage: Side = (shape.matrices(stages, chunk, shape.lanes), plgpu.SMEM((stages, chunk), jnp.float32))
        arrived = plgpu.Barrier(num_barriers=shape.byte_stages, num_arrivals=shape.side_copies)
        byte_sides: tuple[Any, ...] = ((shape.side(shape.byte_stages), arrived),) * 2
        num_filling = 1
    else:
        stage, byte_sides, num_filling = shape.side(stages), (), shape.side_copies
    filled = plgpu.Barrier(num_barriers=stages, num_arrivals=num_filling)
    used = plgpu.Barrier(num_barriers=stages, num_arrivals=num_warpgroups)
    return plgpu.kernel(
        body,
        out_type=output_type,
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "query_buffers": shape.matrices(num_warpgroups, ROWS, shape.lanes),
            "key_stages": stage,
            "value_stages": stage,
            "key_barriers": filled,
            "value_barriers": filled,
            "keys_used": used,
            "values_used": used,
            "cleared": plgpu.Barrier(num_arrivals=num_warpgroups),
            "byte_sides": byte_sides,
        },
        compiler_params=COMPILER_PARAMS,
    )(
        queries, kv, sink_array, block_tables, tile_sequences, tile_starts, tile_positions, tile_lens, num_tiles
    )  # fmt: skip


def output_row(tiles: TileShape, tile: Array, start: Array, token: Array) -> Array:
    """The row of `attend_tiles` that has the output of `token`, which is in the `tile` that starts at `start`."""
    block = (token - start) // ROWS
    return tile * tiles.rows + block * ROWS + token - tiles.first_token(start, block)


@dataclass(frozen=True)
class Work:
    """One program's piece: some row blocks of a tile and a key-value head, and the chunks of keys they see."""

    tile: Array
    head: Array
    part: Array
    sequence: Array
    start: Array
    position: Array
    end: Array
    """One more than the last position any row sees."""
    first_key: Array
    """The first position any row sees."""
    first_chunk: Array
    last_chunk: Array
    """One more than the last."""
    whole_start: Array
    """From this chunk up to `whole_end`, all rows see all keys."""
    whole_end: Array


def read_work(
    shape: KernelShape,
    tiles: TileShape,
    number: Array,
    num_tiles: Ref,
    sequences: Ref,
    starts: Ref,
    positions: Ref,
    lens: Ref,
) -> Work:
    """The piece of this number. Late tiles of a sequence come first, as they see most."""
    per_tile = shape.num_kv_heads * tiles.parts
    tile = num_tiles[0] - 1 - lax.div(number, jnp.int32(per_tile))
    rest = lax.rem(number, jnp.int32(per_tile))
    head, part = lax.div(rest, jnp.int32(tiles.parts)), lax.rem(rest, jnp.int32(tiles.parts))
    # the token blocks of the part's row blocks
    first_row_block = part * tiles.compute_warpgroups
    last_row_block = jnp.minimum(first_row_block + tiles.compute_warpgroups, tiles.row_blocks) - 1
    first_token = lax.div(first_row_block, jnp.int32(shape.group)) * ROWS
    end_token = (lax.div(last_row_block, jnp.int32(shape.group)) + 1) * ROWS
    position, length = positions[tile], lens[tile]
    end = position + jnp.minimum(length, end_token)
    first_query = position + jnp.minimum(first_token, length - 1)
    # nothing to do where the tile ends before the part's tokens begin
    last_chunk = jnp.where(first_token < length, lax.div(end + (shape.chunk - 1), jnp.int32(shape.chunk)), 0)
    whole_end = lax.div(first_query + 1, jnp.int32(shape.chunk))
    first_key = first_chunk = whole_start = jnp.int32(0)
    if shape.window is not None:
        first_key = jnp.maximum(first_query - (shape.window - 1), 0)
        first_chunk = jnp.minimum(lax.div(first_key, jnp.int32(shape.chunk)), last_chunk)
        whole_start = lax.div(jnp.maximum(end - shape.window, 0) + (shape.chunk - 1), jnp.int32(shape.chunk))
    return Work(
        tile, head, part, sequences[tile], starts[tile], position, end, first_key, first_chunk, last_chunk,
        whole_start, whole_end,
    )  # fmt: skip
