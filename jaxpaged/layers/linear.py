"""A linear layer that sums in float32 whatever its weights are."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpaged.sharding import LogicalAxes, sum_over
from pallas_kernels import linear


class Linear(nnx.Module):
    """`inputs @ kernel.T + bias`: float32 sums, bias added in float32, result in the dtype of the inputs.

    `kernel` is [out_dim, in_dim], which CPUs read fastest (README, decision 1); `bias` is [out_dim] or None.
    Both start as zeros: weights come from a checkpoint or from `random_model`. `axes` names those of the kernel for
    `sharding`: where `in_dim` is cut over devices, their sums are added up before the bias.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, use_bias: bool, dtype: DTypeLike, axes: LogicalAxes = (None, None)
    ) -> None:
        self.kernel = nnx.Param(jnp.zeros((out_dim, in_dim), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype), axes=axes[:1]) if use_bias else None
        self.in_axis = axes[1]

    def sums(self, inputs: Float[Array, "tokens in_dim"]) -> Float[Array, "tokens out_dim"]:
        """Return the result in float32, before it is rounded: what logits are."""
        outputs = sum_over(linear(inputs, self.kernel[...]), self.in_axis)
        return outputs if self.bias is None else outputs + self.bias[...].astype(jnp.float32)

    def __call__(self, inputs: Float[Array, "tokens in_dim"]) -> Float[Array, "tokens out_dim"]:
        return self.sums(inputs).astype(inputs.dtype)
