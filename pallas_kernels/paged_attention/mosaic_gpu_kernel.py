"""What the two Hopper kernels share: shapes, the order of a chunk's work, and the decode kernel with its merge.

A chunk of keys is brought to shared memory block by block (one bulk copy a block), scored against 64 query rows by one
matrix instruction stream, weighed by an online softmax in registers, and multiplied with its values. All exponentials
are powers of two: scores carry a factor log2(e).
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.mosaic_gpu_layout import ROW_MULTIPLE
from pallas_kernels.paged_attention.padding import round_up

ROWS = 64
"""Query rows of a matrix instruction."""
LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that is not seen; finite, so that a row that has seen none yet has differences that are numbers."""
SMEM_BYTES = 227 * 1024
"""Shared memory of one program on Hopper."""
SPARE_BYTES = 2 * 1024
"""Of that, what barriers and the compiler take."""
MAX_STAGES = 4
MERGE_UNROLL = 4
"""Partial outputs the merge has in flight."""

Ref = Any
WGMMA = plgpu.Layout.WGMMA
ROW_WISE = plgpu.Layout.WGMMA.reduce(1)
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # the default of jax 0.11 and later: layouts of values are inferred
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
)


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What is static in a kernel."""

    num_kv_heads: int
    group: int
    """Query heads of a key-value head."""
    lanes: int
    """Head dim, padded."""
    block_size: int
    chunk: int
    """Keys of a turn."""
    stages: int
    """Chunks that fit in shared memory."""
    scale: float
    window: int | None
    soft_cap: float | None
    is_interpreted: bool = False
    """Whether products with weights are done by value: jax's interpreter knows no matrix instruction whose left side
    stands in registers."""

    @property
    def group_rows(self) -> int:
        """Rows of a group in an array of partial outputs."""
        return round_up(self.group, ROW_MULTIPLE)

    @property
    def copies_per_chunk(self) -> int:
        return max(self.chunk // self.block_size, 1)

    def with_stages(self, num_queries: int, smem_bytes: int, most: int = MAX_STAGES) -> "KernelShape":
        """With as many stages, 2 to `most`, as fit beside `num_queries` matrices of query rows."""
        room = smem_bytes - SPARE_BYTES - num_queries * ROWS * self.lanes * 2
        stages = room // (2 * self.chunk * self.lanes * 2)
        return replace(self, stages=max(2, min(stages, most)))

    @property
    def swizzle(self) -> int:
        """Bytes of a row of a swizzled tile: the widest that lanes are a multiple of."""
        return next(size for size in (128, 64, 32) if self.lanes * 2 % size == 0)

    @property
    def transforms(self) -> tuple[Any, ...]:
        """How bfloat16 matrices lie in shared memory: swizzled tiles of 8 rows."""
        return plgpu.TilingTransform((ROW_MULTIPLE, self.swizzle // 2)), plgpu.SwizzleTransform(self.swizzle)

    def matrices(self, *shape: int) -> Any:
        """Shared memory for bfloat16 matrices."""
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=self.transforms)


def block_ids(
    shape: KernelShape, tables: Ref, sequence: Array, chunk: Array, first_key: Array, last_block: Array
) -> tuple[Array, ...]:
    """Ids of the blocks of a chunk; past the last block of the sequence that one again, as nothing behind it is read.

    Likewise with a window the block of the first key that is seen, `first_key`, for those before it. To be read from
    the table long before they are used: a load takes about as long as a turn of decodes.
    """
    first = lax.div(chunk * shape.chunk, jnp.int32(shape.block_size))
    indices = [jnp.minimum(first + copy, last_block) for copy in range(shape.copies_per_chunk)]
    if shape.window is not None:
        first_block = lax.div(first_key, jnp.int32(shape.block_size))
        indices = [jnp.maximum(index, first_block) for index in indices]
    return tuple(tables[sequence, index] for index in indices)


def start_copies(
    shape: KernelShape,
    source: Ref,
    target: Ref,
    barrier: Ref,
    ids: tuple[Array, ...],
    head: Array,
    chunk: Array,
) -> None:
    """Begin to bring keys or values of a chunk; each block arrives at `barrier` on its own."""
    if shape.block_size > shape.chunk:
        part = lax.rem(chunk, jnp.int32(shape.block_size // shape.chunk))
        plgpu.copy_gmem_to_smem(source.at[ids[0], head, pl.ds(part * shape.chunk, shape.chunk)], target, barrier)
        return
    for copy, block in enumerate(ids):
        rows = pl.ds(copy * shape.block_size, shape.block_size)
        plgpu.copy_gmem_to_smem(source.at[block, head], target.at[rows], barrier)


def score(shape: KernelShape, queries: Ref, keys: Ref) -> Float[Array, "rows chunk"]:
    """Scores of a chunk, times log2(e)."""

    def multiply(accumulator: Ref) -> Array:
        plgpu.wgmma(accumulator, queries, keys.transpose((1, 0)))
        return accumulator[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, shape.chunk), jnp.float32))
    if shape.soft_cap is None:
        return scores * (shape.scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh has 11 bits only
    powers = jnp.exp2(scores * (2.0 * LOG2_E * shape.scale / shape.soft_cap))
    return shape.soft_cap * LOG2_E - (2.0 * LOG2_E * shape.soft_cap) / (powers + 1.0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weighted", "highest", "total"), meta_fields=()
)
@dataclass(frozen=True)
class Partial:
    """A softmax under way, for each row."""

    weighted: Float[Array, "rows lanes"]
    """Sum of 2 ** (score - highest) * value."""
    highest: Float[Array, "rows"]
    total: Float[Array, "rows"]
    """Sum of 2 ** (score - highest)."""


def nothing(shape: KernelShape) -> Partial:
    """The softmax of no keys."""
    return Partial(
        plgpu.layout_cast(jnp.zeros((ROWS, shape.lanes), jnp.float32), WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), ROW_WISE),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW_WISE),
    )


def row_wise(rows: Float[Array, "rows"], num_columns: int) -> Float[Array, "rows columns"]:
    return lax.broadcast_in_dim(rows, (ROWS, num_columns), [0])


def add_chunk(
    shape: KernelShape,
    before: Partial,
    scores: Float[Array, "rows chunk"],
    values: Ref,
    await_values: Callable[[], None],
) -> Partial:
    """`before` and one chunk; values are first touched after `await_values()`.

    The online softmax of FlashAttention (Dao et al. 2022, section 3.1).
    """
    highest = jnp.maximum(before.highest, scores.max(axis=1))
    shrink = jnp.exp2(before.highest - highest)
    weights = jnp.exp2(scores - row_wise(highest, shape.chunk))
    total = before.total * shrink + weights.sum(axis=1)
    weighted = before.weighted * row_wise(shrink, shape.lanes)
    weights = weights.astype(jnp.bfloat16)
    await_values()
    if shape.is_interpreted:
        products = jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # this read of shared memory is over before the next copy, as a matrix instruction's is
        return Partial(weighted + products, highest, total)

    def multiply(accumulator: Ref) -> None:
        plgpu.wgmma(accumulator, weights, values)

    return Partial(pl.run_state(multiply)(plgpu.ACC.init(weighted)), highest, total)


def load_uncoalesced(source: Ref) -> Float[Array, "rows lanes"]:
    """A matrix from device memory as matrix instructions leave one in registers."""
    index = () if jax.__version_info__ >= (0, 11) else (...,)
    load: Callable[..., Array] = plgpu.load  # its arguments changed
    return load(source, *index, layout=WGMMA, optimized=False)


def clear_stale_rows(shape: KernelShape, values: Ref, first: Array, end: Array) -> None:
    """Zeros in the `values` of the last chunk but for rows `first` to `end`: what is stale there may be NaN.

    A weight of 0 is not enough, as 0 * NaN is NaN. Piece by piece, as the registers are full of outputs. Rows before
    `first` matter with a window only: there the last block may stand for one that is not read (`block_ids`).
    """
    columns = shape.swizzle // 2
    for begin, column in itertools.product(range(0, shape.chunk, ROWS), range(0, shape.lanes, columns)):
        part = values.at[pl.ds(begin, ROWS), pl.ds(column, columns)]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=WGMMA) + begin
        old = plgpu.layout_cast(part[...], WGMMA)
        is_kept = row < end
        if shape.window is not None:
            is_kept &= row >= first
        part[...] = jnp.where(is_kept, old, jnp.zeros_like(old))
    plgpu.commit_smem()


# -- decodes


def attend_decodes(
    shape: KernelShape,
    queries: Float[Array, "seqs kv_heads group_rows lanes"],
    keys: Float[Array, "blocks kv_heads block_size lanes"],
    values: Float[Array, "blocks kv_heads block_size lanes"],
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
        queries: Ref, keys: Ref, values: Ref, tables: Ref, lens: Ref, sequences: Ref, starts: Ref, ends: Ref,
        num_items: Ref, outputs: Ref, sums: Ref, buffers: Ref, query: Ref, key_barriers: Ref, value_barriers: Ref,
        query_barrier: Ref,
    ) -> None:  # fmt: skip
        item, head = lax.axis_index("item"), lax.axis_index("head")

        @pl.when(item < num_items[0])
        def _attend() -> None:
            (key_stages, value_stages), (output, total) = buffers
            sequence, first, end = sequences[item], starts[item], ends[item]
            length = lens[sequence]
            last_block = lax.div(length - 1, jnp.int32(shape.block_size))
            first_key = jnp.int32(0) if shape.window is None else jnp.maximum(length - shape.window, 0)
            plgpu.copy_gmem_to_smem(queries.at[sequence, head], query.at[pl.ds(0, group_rows)], query_barrier)

            def fetch(index: Array, slot: Any, ids: tuple[Array, ...]) -> None:
                start_copies(shape, keys, key_stages.at[slot], key_barriers.at[slot], ids, head, index)
                start_copies(shape, values, value_stages.at[slot], value_barriers.at[slot], ids, head, index)

            def ids_of(index: Array) -> tuple[Array, ...]:
                return block_ids(shape, tables, sequence, index, first_key, last_block)

            for stage in range(stages):

                @pl.when(first + stage < end)
                def _fetch(stage: int = stage) -> None:
                    fetch(first + stage, stage, ids_of(first + stage))

            plgpu.barrier_wait(query_barrier)

            def turn(index: Array, carry: tuple[Partial, tuple[Array, ...]]) -> tuple[Partial, tuple[Array, ...]]:
                partial, ids = carry
                slot = lax.rem(index - first, jnp.int32(stages))
                next_ids = ids_of(index + (stages + 1))
                plgpu.barrier_wait(key_barriers.at[slot])
                scores = score(shape, query, key_stages.at[slot])
                column = plgpu.broadcasted_iota(jnp.int32, (ROWS, chunk), 1, layout=WGMMA) + index * chunk
                is_seen = column < length
                if shape.window is not None:
                    is_seen &= column >= length - shape.window
                scores = jnp.where(is_seen, scores, MASKED)

                def await_values() -> None:
                    plgpu.barrier_wait(value_barriers.at[slot])

                    @pl.when((index + 1) * chunk > length)
                    def _clear() -> None:
                        stage, start = value_stages.at[slot], index * chunk
                        clear_stale_rows(shape, stage, first_key - start, length - start)

                partial = add_chunk(shape, partial, scores, value_stages.at[slot], await_values)

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
    kernel = plgpu.kernel(
        body,
        out_type=(partial_type, partial_type),
        grid=(item_sequences.shape[0], shape.num_kv_heads),
        grid_names=("item", "head"),
        scratch_types=(
            plgpu.RefUnion(
                (shape.matrices(stages, chunk, lanes), shape.matrices(stages, chunk, lanes)), (staged, staged)
            ),
            shape.matrices(ROWS, lanes),
            plgpu.Barrier(num_barriers=stages, num_arrivals=shape.copies_per_chunk),
            plgpu.Barrier(num_barriers=stages, num_arrivals=shape.copies_per_chunk),
            plgpu.Barrier(),
        ),
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(
        queries, keys, values, block_tables, context_lens, item_sequences, item_chunks, item_ends, num_items
    )


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
