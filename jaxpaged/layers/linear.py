"""A linear layer that sums in float32 whatever its weights are."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dot(
    inputs: Float[Array, "tokens in_dim"], kernel: Float[Array, "out_dim in_dim"]
) -> Float[Array, "tokens out_dim"]:
    """Return `inputs @ kernel.T` in float32; ValueError unless both have one dtype: nothing is promoted silently."""
    if inputs.dtype != kernel.dtype:
        raise ValueError(f"inputs are {inputs.dtype} and the kernel is {kernel.dtype}: cast one of them")
    return jax.lax.dot_general(inputs, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """`inputs @ kernel.T + bias`: float32 sums, bias added in float32, result in the dtype of the inputs.

    `kernel` is [out_dim, in_dim], which XLA's CPU dot reads fastest (README, decision 1); `bias` is [out_dim] or None.
    Both start as zeros: weights come from a checkpoint or from `random_model`.
    """

    def __init__(self, in_dim: int, out_dim: int, *, use_bias: bool, dtype: DTypeLike) -> None:
        self.kernel = nnx.Param(jnp.zeros((out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if use_bias else None

    def __call__(self, inputs: Float[Array, "tokens in_dim"]) -> Float[Array, "tokens out_dim"]:
        outputs = dot(inputs, self.kernel[...])
        if self.bias is not None:
            outputs = outputs + self.bias[...].astype(jnp.float32)
        return outputs.astype(inputs.dtype)
