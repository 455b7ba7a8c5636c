"""Keys and values of one byte: a scale for each token and key-value head, found when the token is written.

    stored = head * (1 / scale), scale = largest magnitude of the head / LARGEST[dtype]

Both types are exact in bfloat16, so an implementation multiplies what is stored and puts scales on scores and weights:
(query . stored key) * key scale, and the sum of (weight * value scale) * stored value. What is not finite stands in
the scale alone, which is then NaN: stored bytes are always finite.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""Of the logical dtypes that are quantized, the largest magnitude that is stored."""
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""So that the inverse of a scale is finite."""


class Quantized(NamedTuple):
    """Heads as they are stored, and what they are multiples of; numpy or jax arrays."""

    stored: Any
    """[..., head_dim], of the logical dtype."""
    scales: Any
    """float32 [...]; NaN for a head that was not finite, whose stored numbers are then 0."""

    def dequantized(self) -> Any:
        """float32 [..., head_dim]."""
        return self.stored.astype(np.float32) * self.scales[..., None]


def is_quantized(dtype: Any) -> bool:
    """Whether a logical dtype is stored with scales."""
    return jnp.dtype(dtype).name in LARGEST


def quantize(heads: Any, dtype: Any, numpy: Any) -> Quantized:
    """`heads` [..., head_dim] in a quantized dtype; `numpy` is numpy or jax.numpy, with equal results.

    Products with inverses, not quotients: XLA may turn a quotient into one or not.
    """
    largest_stored = LARGEST[jnp.dtype(dtype).name]
    heads = heads.astype(np.float32)
    largest = numpy.abs(heads).max(-1)
    is_finite = numpy.isfinite(largest)
    scales = numpy.maximum(numpy.where(is_finite, largest, 0.0) * np.float32(1.0 / largest_stored), SMALLEST_SCALE)
    scales = numpy.where(largest == 0.0, np.float32(1.0), scales)
    # cleared before the product: numpy warns of what is not finite in one
    stored = numpy.where(is_finite[..., None], heads, np.float32(0.0)) * (np.float32(1.0) / scales)[..., None]
    stored = numpy.clip(stored, -largest_stored, largest_stored)
    if jnp.issubdtype(jnp.dtype(dtype), jnp.integer):
        stored = numpy.rint(stored)
    return Quantized(stored.astype(dtype), numpy.where(is_finite, scales, np.float32(np.nan)).astype(np.float32))
