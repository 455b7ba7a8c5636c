"""Normalisation of vectors: by their root mean square, or by mean and variance."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpaged.sharding import mean_over


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019), computed in float32, result in the dtype of the inputs.

    What multiplies is `offset + scale`: Gemma keeps the difference from 1, which bfloat16 holds more exactly. `axis`
    names the dimension for `sharding`, where it is one that is cut.
    """

    def __init__(
        self, dim: int, *, eps: float, dtype: DTypeLike, offset: float = 0.0, axis: str | None = None
    ) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(axis,))
        self.dim = dim
        self.axis = axis
        self.eps = eps
        self.offset = offset

    def __call__(self, inputs: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        wide = inputs.astype(jnp.float32)
        variance = mean_over(jnp.mean(jnp.square(wide), axis=-1, keepdims=True), self.axis)
        normalised = wide * jax.lax.rsqrt(variance + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        if self.offset:
            scale = self.offset + scale
        return (normalised * scale).astype(inputs.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm (Ba et al. 2016), computed in float32, result in the dtype of the inputs."""

    def __init__(self, dim: int, *, eps: float, dtype: DTypeLike, is_affine: bool = True) -> None:
        """Without `is_affine` there is neither scale nor bias."""
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(None,)) if is_affine else None
        self.bias = nnx.Param(jnp.zeros((dim,), dtype), axes=(None,)) if is_affine else None
        self.dim = dim
        self.eps = eps

    def __call__(self, inputs: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        wide = inputs.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(variance + self.eps)
        if self.scale is not None and self.bias is not None:
            normalised = normalised * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return normalised.astype(inputs.dtype)


Norm = RMSNorm | LayerNorm
