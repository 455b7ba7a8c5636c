"""What the two Hopper kernels share: shapes, and the order of a chunk's work.

A chunk of keys is brought to shared memory block by block (one bulk copy a block), scored against 64 query rows by one
matrix instruction stream, weighed by an online softmax in registers, and multiplied with its values. All exponentials
are powers of two: scores carry a factor log2(e).

A *side* is keys or values, and with them their scales where they are quantized: a tuple of one or two references, whose
blocks are copied alike. Bytes are made bfloat16, exactly, in shared memory, as matrix instructions multiply equal types
only; scales go on scores and on weights.
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
from jaxtyping import Array, Float, Shaped

from pallas_kernels.paged_attention.mosaic_gpu_layout import ROW_MULTIPLE
from pallas_kernels.paged_attention.padding import round_up
from pallas_kernels.paged_attention.quantization import is_quantized

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

Ref = Any
Side = tuple[Ref, ...]
WGMMA = plgpu.Layout.WGMMA
ROW_WISE = plgpu.Layout.WGMMA.reduce(1)
COLUMN_WISE = plgpu.Layout.WGMMA.reduce(0)
UPCAST = plgpu.Layout.WGMMA_UPCAST_2X
"""Four neighbours in a row to a thread, so that loads of bytes and stores of their bfloat16 are whole words."""
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
    stored: jnp.dtype
    """Dtype of keys and values."""
    byte_stages: int = 0
    """In the tile kernel, chunks of bytes that are on their way to one of the `stages`."""
    is_interpreted: bool = False
    """Whether products with weights are done by value: jax's interpreter knows no matrix instruction whose left side
    stands in registers."""

    @property
    def group_rows(self) -> int:
        """Rows of a group in an array of partial outputs."""
        return round_up(self.group, ROW_MULTIPLE)

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.stored)

    @property
    def copies_per_chunk(self) -> int:
        """Of one array."""
        return max(self.chunk // self.block_size, 1)

    @property
    def side_copies(self) -> int:
        """That bring a chunk of a side."""
        return self.copies_per_chunk * (2 if self.is_quantized else 1)

    def for_decodes(self, smem_bytes: int, most: int = MAX_STAGES) -> "KernelShape":
        """With as many stages, 2 to `most`, as fit beside the query rows in this much shared memory."""
        room = smem_bytes - SPARE_BYTES - self.matrix_bytes(ROWS)
        if self.is_quantized:
            room -= 2 * self.matrix_bytes(self.chunk)
        return replace(self, stages=max(2, min(room // self.stage_bytes, most)))

    def for_tiles(self, num_queries: int) -> "KernelShape":
        """With as many stages as fit beside `num_queries` matrices of query rows in a multiprocessor's shared memory.

        Of bytes 2 chunks or more are on their way to 2 matrices of keys and of values, or to one where no more fit.
        """
        room = SMEM_BYTES - SPARE_BYTES - num_queries * self.matrix_bytes(ROWS)
        if not self.is_quantized:
            return replace(self, stages=max(2, min(room // self.stage_bytes, MAX_STAGES)))
        as_matrices = 2 * (self.matrix_bytes(self.chunk) + self.chunk * 4)
        stages = 2 if room >= 2 * as_matrices + 2 * self.stage_bytes else 1
        byte_stages = (room - stages * as_matrices) // self.stage_bytes
        return replace(self, stages=stages, byte_stages=max(2, min(byte_stages, MAX_STAGES)))

    def matrix_bytes(self, rows: int) -> int:
        """Of a bfloat16 matrix."""
        return rows * self.lanes * 2

    @property
    def stage_bytes(self) -> int:
        """Of a chunk's keys and values, and their scales, as they are stored."""
        row_bytes = self.lanes * self.stored.itemsize + (4 if self.is_quantized else 0)
        return 2 * self.chunk * row_bytes

    def side(self, *shape: int) -> tuple[Any, ...]:
        """Shared memory for so many chunks of a side, as they are stored."""
        heads = self.heads(*shape, self.chunk, self.lanes, dtype=self.stored)
        return (heads, plgpu.SMEM((*shape, self.chunk), jnp.float32)) if self.is_quantized else (heads,)

    def matrices(self, *shape: int) -> Any:
        """Shared memory for bfloat16 matrices."""
        return self.heads(*shape, dtype=jnp.bfloat16)

    def heads(self, *shape: int, dtype: Any) -> Any:
        """Shared memory for matrices of a dtype: swizzled tiles of 8 rows."""
        swizzle, itemsize = self.swizzle(dtype), jnp.dtype(dtype).itemsize
        tiles = plgpu.TilingTransform((ROW_MULTIPLE, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
        return plgpu.SMEM(shape, dtype, transforms=tiles)

    def swizzle(self, dtype: Any) -> int:
        """Bytes of a row of a swizzled tile: the widest that lanes are a multiple of.

        Of bytes at most 64: no wider one has fewer conflicts of banks, and pieces of a tile's width fit in registers.
        """
        itemsize = jnp.dtype(dtype).itemsize
        return next(size for size in (64 * min(itemsize, 2), 64, 32) if self.lanes * itemsize % size == 0)


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
    side: Side,
    targets: Side,
    barrier: Ref,
    ids: tuple[Array, ...],
    head: Array,
    chunk: Array,
) -> None:
    """Begin to bring a chunk of a side; each block of each of its arrays arrives at `barrier` on its own."""
    for source, target in zip(side, targets, strict=True):
        if shape.block_size > shape.chunk:
            part = lax.rem(chunk, jnp.int32(shape.block_size // shape.chunk))
            rows = pl.ds(part * shape.chunk, shape.chunk)
            plgpu.copy_gmem_to_smem(source.at[ids[0], head, rows], target, barrier)
            continue
        for copy, block in enumerate(ids):
            rows = pl.ds(copy * shape.block_size, shape.block_size)
            plgpu.copy_gmem_to_smem(source.at[block, head], target.at[rows], barrier)


def score(
    shape: KernelShape, queries: Ref, keys: Ref, scales: Float[Array, "chunk"] | None
) -> Float[Array, "rows chunk"]:
    """Scores of a chunk of keys, times their `scales`, times log2(e)."""

    def multiply(accumulator: Ref) -> Array:
        plgpu.wgmma(accumulator, queries, keys.transpose((1, 0)))
        return accumulator[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, shape.chunk), jnp.float32))
    factor = shape.scale * LOG2_E * (1.0 if shape.soft_cap is None else 2.0 / shape.soft_cap)
    scores = scores * (factor if scales is None else column_wise(scales * factor))
    if shape.soft_cap is None:
        return scores
    # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh has 11 bits only
    return shape.soft_cap * LOG2_E - (2.0 * LOG2_E * shape.soft_cap) / (jnp.exp2(scores) + 1.0)


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


def row_wise(rows: Shaped[Array, "rows"], num_columns: int) -> Shaped[Array, "rows columns"]:
    return lax.broadcast_in_dim(rows, (ROWS, num_columns), [0])


def column_wise(columns: Float[Array, "columns"]) -> Float[Array, "rows columns"]:
    return lax.broadcast_in_dim(columns, (ROWS, columns.shape[0]), [1])


def add_chunk(
    shape: KernelShape,
    before: Partial,
    scores: Float[Array, "rows chunk"],
    await_values: Callable[[Float[Array, "rows chunk"]], tuple[Array, Ref]],
) -> Partial:
    """`before` and one chunk; `await_values(weights)` gives them as bfloat16, scaled, and then the matrix of values.

    The online softmax of FlashAttention (Dao et al. 2022, section 3.1).
    """
    highest = jnp.maximum(before.highest, scores.max(axis=1))
    shrink = jnp.exp2(before.highest - highest)
    weights = jnp.exp2(scores - row_wise(highest, shape.chunk))
    total = before.total * shrink + weights.sum(axis=1)
    weighted = before.weighted * row_wise(shrink, shape.lanes)
    weights, values = await_values(weights)
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
    columns = shape.swizzle(jnp.bfloat16) // 2
    for begin, column in itertools.product(range(0, shape.chunk, ROWS), range(0, shape.lanes, columns)):
        part = values.at[pl.ds(begin, ROWS), pl.ds(column, columns)]
        row = row_wise(plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_WISE) + begin, columns)
        old = plgpu.layout_cast(part[...], WGMMA)
        is_kept = row < end
        if shape.window is not None:
            is_kept &= row >= first
        part[...] = jnp.where(is_kept, old, jnp.zeros_like(old))
    plgpu.commit_smem()


def read_scales(scales: Ref) -> Float[Array, "chunk"]:
    """Scales of a chunk, as the columns of a matrix instruction's result lie in registers."""
    return plgpu.layout_cast(scales[...], COLUMN_WISE)


def clear_stale_scales(
    shape: KernelShape, scales: Float[Array, "chunk"], first: Array, end: Array
) -> Float[Array, "chunk"]:
    """`scales` with zeros but for those from `first` to `end`: what is stale may be NaN, though its bytes never are."""
    column = plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=COLUMN_WISE)
    is_kept = column < end
    if shape.window is not None:
        is_kept &= column >= first
    return jnp.where(is_kept, scales, jnp.zeros_like(scales))


def convert(shape: KernelShape, stored: Ref, matrix: Ref) -> None:
    """The bytes of a chunk as bfloat16, which all of them are exactly; both in shared memory, piece by piece.

    When it returns, the warpgroup has read the bytes, and the matrix may be multiplied with.
    """
    columns = shape.swizzle(shape.stored)
    for begin, column in itertools.product(range(0, shape.chunk, ROWS), range(0, shape.lanes, columns)):
        piece = pl.ds(begin, ROWS), pl.ds(column, columns)
        heads = plgpu.layout_cast(stored.at[*piece][...], UPCAST)
        if jnp.issubdtype(shape.stored, jnp.floating):
            heads = heads.astype(jnp.float32)  # there is no instruction from float8 to bfloat16
        matrix.at[*piece][...] = heads.astype(jnp.bfloat16)
    plgpu.commit_smem()
