"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019), computed in float32, result in the dtype of the inputs."""

    def __init__(self, dim: int, *, eps: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, inputs: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        wide = inputs.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normalised = wide * jax.lax.rsqrt(variance + self.eps)
        return (normalised * self.scale[...].astype(jnp.float32)).astype(inputs.dtype)
