"""All that is static about a call of the kernels in mosaic_tpu_kernel.py, and what follows from it."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.paged_attention.mosaic_tpu_layout import LANES, SUBLANES, LaneGroups
from pallas_kernels.paged_attention.padding import round_up
from pallas_kernels.paged_attention.quantization import is_quantized


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """All that is static about a call."""

    groups: LaneGroups
    rows_per_token: int
    """Query heads of one lane group."""
    token_rows: int
    """Query tokens of a program: 1 for decodes, else a multiple of 8."""
    block_size: int
    blocks_per_seq: int
    chunk_blocks: int
    """Blocks of a chunk."""
    cache_dtype: jnp.dtype
    """Logical dtype of the cache."""
    dtype: jnp.dtype
    """Of the operands of both products; sums are float32."""
    scale: float
    window: int | None
    soft_cap: float | None
    has_sinks: bool

    @property
    def num_groups(self) -> int:
        """Lane groups of the cache."""
        return self.groups.count

    @property
    def group_lanes(self) -> int:
        """Lanes of one of them, a multiple of 128."""
        return self.groups.lanes

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.cache_dtype)

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_blocks * self.block_size

    @property
    def is_decode(self) -> bool:
        return self.token_rows == 1

    @property
    def group_rows(self) -> int:
        """Rows of one group's score matrix."""
        if self.is_decode:
            return round_up(self.rows_per_token, SUBLANES)
        return self.rows_per_token * self.token_rows

    @property
    def pieces(self) -> int:
        """Packed rows of one query row."""
        return self.group_lanes // LANES

    @property
    def packed_rows(self) -> int:
        """Packed rows of one token, padded so that a copy can begin at each token."""
        return round_up(self.num_groups * self.rows_per_token * self.pieces, SUBLANES)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        if self.is_quantized:
            return 4 * (self.groups.word_lanes + self.groups.scale_lanes)
        return self.num_groups * self.group_lanes * (8 if self.cache_dtype == jnp.float32 else 4)

    @property
    def buffer_bytes(self) -> int:
        """Vector memory of the buffers of a call: chunks, the softmax under way, queries and outputs."""
        chunk = self.chunk_tokens * self.token_bytes
        rows = self.num_groups * self.group_rows
        # the last axis of highest, total and sinks takes a whole register; sinks, like all operands, are there twice
        state = rows * (self.group_lanes + (4 if self.has_sinks else 2) * LANES) * 4
        if self.is_decode:
            return 2 * chunk + state + 4 * rows * self.group_lanes * 4
        tile = self.token_rows * self.packed_rows * LANES * 4
        return 2 * chunk + state + 3 * tile + rows * self.group_lanes * self.dtype.itemsize
