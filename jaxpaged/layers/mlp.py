"""The gated feed-forward layer."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpaged.layers.linear import Linear

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }
)
"""The activations by the name that `ModelConfig.activation` gives them."""


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020); the product is taken in float32."""

    def __init__(
        self, model_dim: int, mlp_dim: int, *, activation: str, use_bias: bool, dtype: DTypeLike
    ) -> None:
        self.gate = Linear(model_dim, mlp_dim, use_bias=use_bias, dtype=dtype, axes=("mlp", None))
        self.up = Linear(model_dim, mlp_dim, use_bias=use_bias, dtype=dtype, axes=("mlp", None))
        self.down = Linear(mlp_dim, model_dim, use_bias=use_bias, dtype=dtype, axes=(None, "mlp"))
        self.activation = activation

    def __call__(self, hidden: Float[Array, "tokens model_dim"]) -> Float[Array, "tokens model_dim"]:
        gate = ACTIVATIONS[self.activation](self.gate(hidden).astype(jnp.float32))
        return self.down((gate * self.up(hidden).astype(jnp.float32)).astype(hidden.dtype))


class MLP(nnx.Module):
    """`down(activation(up(x)))`; the activation is taken in float32."""

    def __init__(
        self, model_dim: int, mlp_dim: int, *, activation: str, use_bias: bool, dtype: DTypeLike
    ) -> None:
        self.up = Linear(model_dim, mlp_dim, use_bias=use_bias, dtype=dtype, axes=("mlp", None))
        self.down = Linear(mlp_dim, model_dim, use_bias=use_bias, dtype=dtype, axes=(None, "mlp"))
        self.activation = activation

    def __call__(self, hidden: Float[Array, "tokens model_dim"]) -> Float[Array, "tokens model_dim"]:
        return self.down(ACTIVATIONS[self.activation](self.up.sums(hidden)).astype(hidden.dtype))
