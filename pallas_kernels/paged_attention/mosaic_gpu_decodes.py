"""The Hopper kernels for decodes: items of their keys, one a program, and the merge of what these found."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.mosaic_gpu_chunk import (
    COMPILER_PARAMS,
    MASKED,
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
    nothing,
    read_scales,
    row_wise,
    score,
    start_copies,
)
from pallas_kernels.paged_attention.mosaic_gpu_layout import Cache

MERGE_UNROLL = 4
"""Partial outputs the merge has in flight."""


def attend_decodes(
    shape: KernelShape,
    queries: Float[Array, "seqs kv_heads group_rows lanes"],
    kv: Cache,
    block_tables: Int[Array, "seqs blocks_per_seq"],
    context_lens: Int[Array, "seqs"],
    item_sequences: Int[Array, "items"],
    item_chunks: Int[Array, "items"],
    item_ends: Int[Array, "items"],
    num_items: Int[Array, "1"],
) -> tuple[Float[Array, "items kv_heads group_rows lanes"], Float[Array, "items kv_heads group_rows lanes"]]:
    """Partial outputs of the decodes and, repeated over the lanes, the log2 of the sum of their weights.

    One program attends the query heads of one key-value head to one item: chunks `item_chunks[i]` up to
    `item_ends[i]` of sequence `item_sequences[i]`. It brings the next chunks while it computes; several programs
    share a multiprocessor, so that one computes while another waits. What is past `num_items` stays as it was.
    """
    group_rows, lanes, stages, chunk = shape.group_rows, shape.lanes, shape.stages, shape.chunk
    partial_type = jax.ShapeDtypeStruct((item_sequences.shape[0], shape.num_kv_heads, group_rows, lanes), jnp.float32)

    def body(
        queries: Ref, kv: Side, tables: Ref, lens: Ref, sequences: Ref, starts: Ref, ends: Ref, num_items: Ref,
        outputs: Ref, sums: Ref, *, buffers: Any, scale_stages: Side, query: Ref, key_barriers: Ref,
        value_barriers: Ref, query_barrier: Ref,
    ) -> None:  # fmt: skip
        item, head = lax.axis_index("item"), lax.axis_index("head")

        @pl.when(item < num_items[0])
        def _attend() -> None:
            (key_stages, value_stages, *matrices), (output, total) = buffers
            sequence, first, end = sequences[item], starts[item], ends[item]
            length = lens[sequence]
            last_block = lax.div(length - 1, jnp.int32(shape.block_size))
            first_key = jnp.int32(0) if shape.window is None else jnp.maximum(length - shape.window, 0)
            plgpu.copy_gmem_to_smem(queries.at[sequence, head], query.at[pl.ds(0, group_rows)], query_barrier)

            def fetch(index: Array, slot: Any, ids: tuple[Array, ...]) -> None:
                sides = (key_stages, *scale_stages[:1]), (value_stages, *scale_stages[1:])
                barriers = key_barriers, value_barriers
                for source, stages, arrived in zip((kv[0::2], kv[1::2]), sides, barriers, strict=True):
                    targets = tuple(stage.at[slot] for stage in stages)
                    start_copies(shape, source, targets, arrived.at[slot], ids, head, index)

            def ids_of(index: Array) -> tuple[Array, ...]:
                return block_ids(shape, tables, sequence, index, first_key, last_block)

            for stage in range(stages):

                @pl.when(first + stage < end)
                def _fetch(stage: int = stage) -> None:
                    fetch(first + stage, stage, ids_of(first + stage))

            plgpu.barrier_wait(query_barrier)

            def score_keys(slot: Array) -> Array:
                plgpu.barrier_wait(key_barriers.at[slot])
                if not shape.is_quantized:
                    return score(shape, query, key_stages.at[slot], None)
                scales = read_scales(scale_stages[0].at[slot])
                convert(shape, key_stages.at[slot], matrices[0])
                return score(shape, query, matrices[0], scales)

            def await_values(index: Array, slot: Array, weights: Array) -> tuple[Array, Ref]:
                start = index * chunk
                if shape.is_quantized:
                    plgpu.barrier_wait(value_barriers.at[slot])
                    scales = read_scales(scale_stages[1].at[slot])
                    scales = clear_stale_scales(shape, scales, first_key - start, length - start)
                    weights = (weights * column_wise(scales)).astype(jnp.bfloat16)
                    convert(shape, value_stages.at[slot], matrices[1])
                    return weights, matrices[1]
                weights = weights.astype(jnp.bfloat16)
                plgpu.barrier_wait(value_barriers.at[slot])

                @pl.when(start + chunk > length)
                def _clear() -> None:
                    clear_stale_rows(shape, value_stages.at[slot], first_key - start, length - start)

                return weights, value_stages.at[slot]

            def turn(index: Array, carry: tuple[Partial, tuple[Array, ...]]) -> tuple[Partial, tuple[Array, ...]]:
                partial, ids = carry
                slot = lax.rem(index - first, jnp.int32(stages))
                next_ids = ids_of(index + (stages + 1))
                scores = score_keys(slot)
                column = plgpu.broadcasted_iota(jnp.int32, (ROWS, chunk), 1, layout=WGMMA) + index * chunk
                is_seen = column < length
                if shape.window is not None:
                    is_seen &= column >= length - shape.window
                scores = jnp.where(is_seen, scores, MASKED)
                partial = add_chunk(shape, partial, scores, functools.partial(await_values, index, slot))

                @pl.when(index + stages < end)
                def _fetch() -> None:
                    fetch(index + stages, slot, ids)

                return partial, next_ids

            partial, _ = lax.fori_loop(first, end, turn, (nothing(shape), ids_of(first + stages)))
            # every chunk has arrived and is used: its memory now takes what is sent back
            output[...] = partial.weighted / row_wise(partial.total, lanes)
            total[...] = row_wise(partial.highest + jnp.log2(partial.total), lanes)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(output.at[pl.ds(0, group_rows)], outputs.at[item, head])
            plgpu.copy_smem_to_gmem(total.at[pl.ds(0, group_rows)], sums.at[item, head])
            plgpu.wait_smem_to_gmem(0)

    staged = plgpu.SMEM((ROWS, lanes), jnp.float32)
    heads, *scales = shape.side(stages)
    # one for keys and one for values: the barrier behind writing either says that products with the other are over
    matrices = (shape.matrices(chunk, lanes),) * 2 if shape.is_quantized else ()
    kernel = plgpu.kernel(
        body,
        out_type=(partial_type, partial_type),
        grid=(item_sequences.shape[0], shape.num_kv_heads),
        grid_names=("item", "head"),
        scratch_types={
            "buffers": plgpu.RefUnion((heads, heads, *matrices), (staged, staged)),
            "scale_stages": (*scales, *scales),
            "query": shape.matrices(ROWS, lanes),
            "key_barriers": plgpu.Barrier(num_barriers=stages, num_arrivals=shape.side_copies),
            "value_barriers": plgpu.Barrier(num_barriers=stages, num_arrivals=shape.side_copies),
            "query_barrier": plgpu.Barrier(),
        },
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(queries, kv, block_tables, context_lens, item_sequences, item_chunks, item_ends, num_items)


def merge_items(
    shape: KernelShape,
    outputs: Float[Array, "items kv_heads group_rows lanes"],
    sums: Float[Array, "items kv_heads group_rows lanes"],
    sinks: Float[Array, "kv_heads group_rows lanes"],
    first_items: Int[Array, "seqs_plus_1"],
) -> Float[Array, "seqs kv_heads group_rows lanes"]:
    """Of each sequence the sum of its items' outputs, by the share of their weights; sinks take theirs.

    `first_items` has the first item of each sequence, and at its end their number. Sinks are times log2(e).
    """
    num_seqs = first_items.shape[0] - 1
    shape_of_group = (shape.group_rows, shape.lanes)

    def body(outputs: Ref, sums: Ref, sinks: Ref, first_items: Ref, merged: Ref) -> None:
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        first, end = first_items[sequence], first_items[sequence + 1]

        def turn(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            weighted, highest, total = carry
            items = [first + index * MERGE_UNROLL + i for i in range(MERGE_UNROLL)]
            clamped = [jnp.minimum(item, end - 1) for item in items]
            parts = [outputs[item, head] for item in clamped]
            unless_past = [jnp.where(item < end, 0.0, MASKED) for item in items]
            logs = [sums[item, head] + masked for item, masked in zip(clamped, unless_past, strict=True)]
            common = functools.reduce(jnp.maximum, logs, highest)
            shrink = jnp.exp2(highest - common)
            weighted, total = weighted * shrink, total * shrink
            for part, log in zip(parts, logs, strict=True):
                weight = jnp.exp2(log - common)
                weighted, total = weighted + weight * part, total + weight
            return weighted, common, total

        @pl.when(first < end)
        def _merge() -> None:
            start = (jnp.zeros(shape_of_group, jnp.float32), sinks[head], jnp.ones(shape_of_group, jnp.float32))
            num_turns = lax.div(end - first + (MERGE_UNROLL - 1), jnp.int32(MERGE_UNROLL))
            weighted, _, total = lax.fori_loop(0, num_turns, turn, start)
            merged[sequence, head] = weighted / total

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_seqs, shape.num_kv_heads, *shape_of_group), jnp.float32),
        grid=(num_seqs, shape.num_kv_heads),
        grid_names=("sequence", "head"),
        compiler_params=COMPILER_PARAMS,
    )(outputs, sums, sinks, first_items)
