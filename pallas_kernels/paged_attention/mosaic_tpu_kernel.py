"""The Pallas kernel behind mosaic_tpu.py: one body for decodes (a token a program) and for tiles (many tokens each).

The grid has one program per decode or tile that is there, run one after the other on a core. A program walks over the
keys of its sequence chunk by chunk; the blocks of a chunk are copied from HBM one by one, as the block table says, into
one of two buffers. While a chunk is computed the next one is on its way, and it may be the first of the next program:

    program     i                       i + 1
    compute     chunk 0    chunk 1      chunk 0
    copy        chunk 1    chunk 0 of i + 1       ...

Rows of a score matrix are the query rows of one *lane group* (mosaic_tpu_layout.py): for tiles all tokens of its first
query head, then all of the next, so that a group's rows are stacked without moving sublanes. Queries and outputs of
tiles lie in HBM as *packed rows* of 128 lanes, token after token; those of one head are gathered from them by loads
with a stride, which exist for rows of one register of 32-bit numbers only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, SUBLANES
from pallas_kernels.paged_attention.mosaic_tpu_quantized import (
    scales_by_head,
    scales_of_rows,
    stored_keys_and_values,
)
from pallas_kernels.paged_attention.mosaic_tpu_shape import KernelShape

MASKED = -1e30
"""Score of a key that is not seen: finite, so that a difference of two of them is 0 and not NaN."""


def _span(shape: KernelShape, first: Array, end: Array) -> tuple[Array, Array, Array]:
    """(first key in use, first key of the first chunk, number of chunks) of queries at positions first .. end - 1."""
    in_use = jnp.int32(0) if shape.window is None else jnp.maximum(first - (shape.window - 1), 0)
    # chunks of tiles are counted from position 0, so that a row's sums do not depend on its tile mates
    step = shape.block_size if shape.is_decode else shape.chunk_tokens
    start = in_use // step * step
    return in_use, start, jnp.maximum(pl.cdiv(end - start, shape.chunk_tokens), 1)


def _copy_blocks(
    shape: KernelShape, tables: Any, kv: Any, buffer: Any, arrived: Any, sequence: Array, used: tuple[Array, Array],
    start: Array, slot: Array, *, is_wait: bool,
) -> None:  # fmt: skip
    """Start, or wait for, the copies of those blocks of the chunk at key `start` that hold keys in use."""
    first_block = start // shape.block_size
    begin = jnp.maximum(used[0] // shape.block_size, first_block)
    end = jnp.minimum(pl.cdiv(used[1], shape.block_size), first_block + shape.chunk_blocks)

    def copy(index: Array, carry: None) -> None:
        block = tables[sequence * shape.blocks_per_seq + index]
        copied = pltpu.make_async_copy(kv.at[block], buffer.at[slot, index - first_block], arrived.at[slot])
        if is_wait:
            copied.wait()
        else:
            copied.start()

    lax.fori_loop(begin, end, copy, None)


def _clear_unused(shape: KernelShape, buffer: Any, slot: Array, used: tuple[Array, Array], start: Array) -> None:
    """Put 0 where the chunk at key `start` has no key in use: 0 * NaN would be NaN."""

    @pl.when((used[0] > start) | (used[1] < start + shape.chunk_tokens))
    def clear() -> None:
        chunk = buffer.at[slot]
        axis = len(chunk.shape) - 2
        position = start + lax.broadcasted_iota(jnp.int32, chunk.shape, 0) * shape.block_size
        position += lax.broadcasted_iota(jnp.int32, chunk.shape, axis)
        is_used = (position >= used[0]) & (position < used[1])
        chunk[...] = jnp.where(is_used, chunk[...], jnp.zeros((), buffer.dtype))


def _keys_and_values(
    shape: KernelShape, buffer: Any, slot: Array, group: int
) -> tuple[Shaped[Array, "keys lanes"], Shaped[Array, "keys lanes"]]:
    """One lane group of the chunk in `slot`, as operands."""
    lanes = slice(group * shape.group_lanes, (group + 1) * shape.group_lanes)
    rows = (shape.chunk_tokens, shape.group_lanes)
    if shape.is_quantized:
        return stored_keys_and_values(shape.groups, shape.cache_dtype, shape.dtype, buffer.at[slot], group)
    if shape.cache_dtype == jnp.float32:
        keys, values = buffer[slot, :, 0, :, lanes], buffer[slot, :, 1, :, lanes]
        return keys.reshape(rows).astype(shape.dtype), values.reshape(rows).astype(shape.dtype)
    words = buffer[slot, :, :, lanes].reshape(rows)
    # a bfloat16 is the upper half of the float32 of equal value
    keys = lax.bitcast_convert_type(words << 16, jnp.float32)
    values = lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return keys.astype(shape.dtype), values.astype(shape.dtype)


def _attend_chunk(
    shape: KernelShape, query: Callable[[int], Array], buffer: Any, state: tuple[Any, Any, Any], slot: Array,
    first: Array, start: Array,
) -> None:  # fmt: skip
    """Take the chunk at key `start` into the softmax under way (weighted values, highest score, total weight)."""
    weighted, highest, total = state
    # float32 operands of the matrix unit are cut to bfloat16 unless told otherwise
    precision = lax.Precision.HIGHEST if shape.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    num_tokens = shape.group_rows if shape.is_decode else shape.token_rows
    by_token = (shape.group_rows // num_tokens, num_tokens, shape.chunk_tokens)
    key_position = start + lax.broadcasted_iota(jnp.int32, by_token[1:], 1)
    position = first
    if not shape.is_decode:
        position = first + lax.broadcasted_iota(jnp.int32, by_token[1:], 0)
    is_seen = key_position <= position
    if shape.window is not None:
        is_seen &= key_position > position - shape.window
    scales: Any = scales_by_head(shape.groups, buffer.at[slot]) if shape.is_quantized else None
    by_row = partial(scales_of_rows, shape.groups, shape.group_rows, shape.rows_per_token, shape.token_rows, scales)
    for group in range(shape.num_groups):
        keys, values = _keys_and_values(shape, buffer, slot, group)
        scores = product(query(group), keys, (((1,), (1,)), ((), ()))) * shape.scale
        if shape.is_quantized:
            scores = scores * by_row(group, is_of_values=False)
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        scores = jnp.where(is_seen, scores.reshape(by_token), MASKED).reshape(scores.shape)
        before = highest[group]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        # a row that has seen no key yet weighs them all by 1; its first real score shrinks what that gave to 0
        weights = jnp.exp(scores - now)
        shrink = jnp.exp(before - now)
        highest[group] = now
        total[group] = total[group] * shrink + weights.sum(axis=1, keepdims=True)
        if shape.is_quantized:
            weights = weights * by_row(group, is_of_values=True)
        weighted[group] = weighted[group] * shrink + product(
            weights.astype(shape.dtype), values, (((1,), (0,)), ((), ()))
        )


def _begin(shape: KernelShape, state: tuple[Any, Any, Any], sinks: Any) -> None:
    """An empty softmax; a sink is a score that has been seen already and brought no value."""
    weighted, highest, total = state
    weighted[...] = jnp.zeros(weighted.shape, jnp.float32)
    if shape.has_sinks:
        highest[...] = jnp.maximum(sinks[...], MASKED)
        total[...] = jnp.ones(total.shape, jnp.float32)
    else:
        highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)


def _walk(
    shape: KernelShape, span: Callable[[Array], tuple[Array, Array, Array]], query: Callable[[int], Array],
    tables: Any, kv: Any, sinks: Any, buffer: Any, arrived: Any, state: tuple[Any, Any, Any], turn: Any,
) -> None:  # fmt: skip
    """All chunks of this program; `span(i)` is (sequence, first position, end position) of program i.

    `turn[0]` is the buffer that holds, or is being filled with, the first chunk of this program.
    """
    program, num_programs = pl.program_id(0), pl.num_programs(0)
    following = jnp.minimum(program + 1, num_programs - 1)
    sequence, first, end = span(program)
    in_use, start, num_chunks = _span(shape, first, end)
    next_sequence, next_first, next_end = span(following)
    next_in_use, next_start, _ = _span(shape, next_first, next_end)
    copy = partial(_copy_blocks, shape, tables, kv, buffer, arrived)

    @pl.when(program == 0)
    def copy_first_chunk() -> None:
        turn[0] = 0
        copy(sequence, (in_use, end), start, jnp.int32(0), is_wait=False)

    _begin(shape, state, sinks)
    begin_slot = turn[0]

    def attend_chunk(index: Array, carry: None) -> None:
        slot = lax.rem(begin_slot + index, 2)
        chunk_start = start + index * shape.chunk_tokens
        is_last = index + 1 == num_chunks

        @pl.when(jnp.logical_not(is_last))
        def copy_next_chunk() -> None:
            copy(sequence, (in_use, end), chunk_start + shape.chunk_tokens, 1 - slot, is_wait=False)

        @pl.when(is_last & (program + 1 < num_programs))
        def copy_first_chunk_of_next_program() -> None:
            copy(next_sequence, (next_in_use, next_end), next_start, 1 - slot, is_wait=False)

        copy(sequence, (in_use, end), chunk_start, slot, is_wait=True)
        _clear_unused(shape, buffer, slot, (in_use, end), chunk_start)
        _attend_chunk(shape, query, buffer, state, slot, first, chunk_start)

    lax.fori_loop(0, num_chunks, attend_chunk, None)
    turn[0] = lax.rem(begin_slot + num_chunks, 2)


def _pieces(shape: KernelShape) -> Iterator[tuple[int, slice, slice]]:
    """(group, rows, lanes) of the stacked rows that each packed row of a token belongs to, in their order."""
    for group in range(shape.num_groups):
        for row in range(shape.rows_per_token):
            for piece in range(shape.pieces):
                rows = slice(row * shape.token_rows, (row + 1) * shape.token_rows)
                yield group, rows, slice(piece * LANES, (piece + 1) * LANES)


def _finished(state: tuple[Any, Any, Any], group: int) -> Array:
    """The attention output of one group's rows; rows that saw nothing are 0."""
    weighted, _, total = state
    return weighted[group] / jnp.maximum(total[group], 1e-30)


def _decode_kernel(
    shape: KernelShape, tables: Any, contexts: Any, query: Any, sinks: Any, kv: Any, output: Any, buffer: Any,
    arrived: Any, weighted: Any, highest: Any, total: Any, turn: Any,
) -> None:  # fmt: skip
    state = (weighted, highest, total)

    def span(index: Array) -> tuple[Array, Array, Array]:
        return index, contexts[index] - 1, contexts[index]

    _walk(shape, span, lambda group: query[0, group], tables, kv, sinks, buffer, arrived, state, turn)
    for group in range(shape.num_groups):
        output[0, group] = _finished(state, group).astype(output.dtype)


def _tile_kernel(
    shape: KernelShape, tables: Any, sequences: Any, starts: Any, firsts: Any, lens: Any, query: Any, sinks: Any,
    kv: Any, output: Any, buffer: Any, arrived: Any, weighted: Any, highest: Any, total: Any, turn: Any,
    query_rows: Any, stacked: Any, output_rows: Any, query_arrived: Any, output_left: Any,
) -> None:  # fmt: skip
    state = (weighted, highest, total)
    program, num_programs = pl.program_id(0), pl.num_programs(0)
    rows = shape.packed_rows

    def span(index: Array) -> tuple[Array, Array, Array]:
        return sequences[index], firsts[index], firsts[index] + lens[index]

    def query_copy(index: Array) -> Any:
        # rows behind the tile's end belong to other tokens, and are computed in vain
        begin = pl.multiple_of(starts[index] * rows, SUBLANES)
        slot = lax.rem(index, 2)
        return pltpu.make_async_copy(
            query.at[pl.ds(begin, shape.token_rows * rows)], query_rows.at[slot], query_arrived.at[slot]
        )

    def output_copy(index: Array) -> Any:
        # whole tiles: what is behind a tile's end is written again by the tiles of those tokens, which come later
        begin = pl.multiple_of(starts[index] * rows, SUBLANES)
        return pltpu.make_async_copy(
            output_rows, output.at[pl.ds(begin, shape.token_rows * rows)], output_left
        )

    @pl.when(program == 0)
    def copy_first_query() -> None:
        query_copy(program).start()

    @pl.when(program + 1 < num_programs)
    def copy_next_query() -> None:
        query_copy(program + 1).start()

    query_copy(program).wait()
    arrived_rows = query_rows.at[lax.rem(program, 2)]
    for packed, (group, its_rows, its_lanes) in enumerate(_pieces(shape)):
        piece = arrived_rows[pl.ds(packed, shape.token_rows, stride=rows)]
        stacked[group, its_rows, its_lanes] = piece.astype(shape.dtype)

    _walk(shape, span, lambda group: stacked[group], tables, kv, sinks, buffer, arrived, state, turn)

    @pl.when(program > 0)
    def wait_for_output_of_program_before() -> None:
        output_copy(program - 1).wait()

    for group in range(shape.num_groups):
        weighted[group] = _finished(state, group)
    for packed, (group, its_rows, its_lanes) in enumerate(_pieces(shape)):
        output_rows[pl.ds(packed, shape.token_rows, stride=rows)] = weighted[group, its_rows, its_lanes]
    output_copy(program).start()

    @pl.when(program + 1 == num_programs)
    def wait_for_last_output() -> None:
        output_copy(program).wait()


def _in_hbm(kv: Array) -> Array:
    """The cache, kept from being moved: XLA copies one that fits there into vector memory before a call."""
    return pltpu.with_memory_space_constraint(kv, pltpu.HBM)


def _scratch(shape: KernelShape, kv: jax.ShapeDtypeStruct) -> list[Any]:
    """Buffers and semaphores of both kernels."""
    rows = (shape.num_groups, shape.group_rows)
    return [
        pltpu.VMEM((2, shape.chunk_blocks, *kv.shape[1:]), kv.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((*rows, shape.group_lanes), jnp.float32),
        pltpu.VMEM((*rows, 1), jnp.float32),
        pltpu.VMEM((*rows, 1), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]


# jitted, so that all layers of a step are lowered once
@partial(jax.jit, static_argnames=("shape", "output_dtype", "vmem_limit_bytes"))
def attend_decodes(
    shape: KernelShape,
    query: Shaped[Array, "seqs groups group_rows lanes"],
    sinks: Float[Array, "groups group_rows 1"],
    kv: Any,
    tables: Int[Array, "seqs blocks_per_seq"],
    context_lens: Int[Array, "seqs"],
    num_decodes: Int[Array, ""],
    *,
    output_dtype: jnp.dtype,
    vmem_limit_bytes: int,
) -> Shaped[Array, "seqs groups group_rows lanes"]:
    """The output rows of the first `num_decodes` sequences; the others are not written."""
    rows = query.shape[1:]
    one = pl.BlockSpec((1, *rows), lambda index, *_: (index, 0, 0, 0))
    return pl.pallas_call(
        partial(_decode_kernel, shape),
        out_shape=jax.ShapeDtypeStruct(query.shape, output_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num_decodes,),
            in_specs=[
                one,
                pl.BlockSpec(sinks.shape, lambda index, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=one,
            scratch_shapes=_scratch(shape, kv),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes),
        name="paged_attention_decodes",
    )(tables.reshape(-1), context_lens, query, sinks, _in_hbm(kv))


@partial(jax.jit, static_argnames=("shape", "vmem_limit_bytes"))
def attend_tiles(
    shape: KernelShape,
    query: Float[Array, "packed_rows lanes"],
    sinks: Float[Array, "groups group_rows 1"],
    kv: Any,
    tables: Int[Array, "seqs blocks_per_seq"],
    tiles: tuple[Int[Array, "tiles"], Int[Array, "tiles"], Int[Array, "tiles"], Int[Array, "tiles"]],
    num_tiles: Int[Array, ""],
    *,
    vmem_limit_bytes: int,
) -> Float[Array, "packed_rows lanes"]:
    """The output rows of the tokens of all tiles; those of other tokens are anything.

    `tiles` are sequence, first token, first position and number of tokens of each; `query` has token_rows tokens more
    than there are, so that a tile can be read whole.
    """
    tile = (shape.token_rows * shape.packed_rows, LANES)
    return pl.pallas_call(
        partial(_tile_kernel, shape),
        out_shape=jax.ShapeDtypeStruct(query.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_tiles,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(sinks.shape, lambda index, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *_scratch(shape, kv),
                pltpu.VMEM((2, *tile), jnp.float32),
                pltpu.VMEM((shape.num_groups, shape.group_rows, shape.group_lanes), shape.dtype),
                pltpu.VMEM(tile, jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes),
        name="paged_attention_tiles",
    )(tables.reshape(-1), *tiles, query, sinks, _in_hbm(kv))
