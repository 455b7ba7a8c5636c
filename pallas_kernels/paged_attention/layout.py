"""How one backend stores a layer's keys and values."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import check_count, dtype_name
from pallas_kernels.paged_attention.api import AttentionCase, Implementation, pick, why_no_saving
from pallas_kernels.paged_attention.quantization import Quantized, is_quantized, quantize


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """The cache of one layer: a pytree whose leaves all have the block as their leading axis.

    What stands in a block only the implementation knows; swap and copy treat it as opaque. Raises ValueError when
    `implementation` is unknown or does not serve these shapes.
    """

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    """Logical dtype of keys and values; the stored one may be its bits. float8_e4m3fn and int8 have scales beside."""
    implementation: str | None = None
    """A name of IMPLEMENTATIONS; None for the one picked for the target platform."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        _ = self.row

    @property
    def row(self) -> Implementation:
        """The implementation this layout is made for."""
        return pick(self._case, self.implementation)

    @property
    def _case(self) -> AttentionCase:
        return AttentionCase(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
        )

    @property
    def why_no_saving(self) -> str | None:
        """Why a cache of bytes takes as much as one of bfloat16 here, or more; None where it takes less, or has no
        bytes."""
        return why_no_saving(self.row, self._case)

    def shapes(self, num_blocks: int) -> Any:
        """A tree of jax.ShapeDtypeStruct: the layer cache without its memory. ValueError for less than a block."""
        check_count("num_blocks", num_blocks)
        return self.row.cache_shapes(
            num_blocks, self.block_size, self.num_kv_heads, self.head_dim, jnp.dtype(self.dtype)
        )

    def init(self, num_blocks: int) -> Any:
        """A layer cache of zeros, block 0 (the null block) among the `num_blocks`."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.shapes(num_blocks))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes(1)))

    @property
    def head_axes(self) -> Any:
        """For each leaf the axis that heads lie along: caches of devices that hold some heads each stand side by side
        there, as parts of one array."""

        def shapes(num_kv_heads: int) -> Any:
            return self.row.cache_shapes(1, self.block_size, num_kv_heads, self.head_dim, jnp.dtype(self.dtype))

        def axis(few: jax.ShapeDtypeStruct, many: jax.ShapeDtypeStruct) -> int:
            (found,) = (i for i, (a, b) in enumerate(zip(few.shape, many.shape, strict=True)) if a != b)
            return found

        # heads may share lanes, so that two need no more room than one
        return jax.tree.map(axis, shapes(self.num_kv_heads), shapes(1024 * self.num_kv_heads))

    def pack(self, key: np.ndarray, value: np.ndarray) -> Any:
        """A layer cache from keys and values [blocks, block_size, kv_heads, head_dim]."""
        dtype = jnp.dtype(self.dtype)
        pair = (quantize(a, dtype, np) if is_quantized(dtype) else a.astype(dtype) for a in (key, value))
        return jax.tree.map(jnp.asarray, self.row.pack(*pair))

    def unpack(self, kv: Any) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [blocks, block_size, kv_heads, head_dim] of a layer cache, in the logical dtype.

        Those of a quantized one are float32, times their scales.
        """
        pair = self.row.unpack(jax.tree.map(np.asarray, kv), self.num_kv_heads, self.head_dim)
        key, value = (a.dequantized() if isinstance(a, Quantized) else a for a in pair)
        return key, value
