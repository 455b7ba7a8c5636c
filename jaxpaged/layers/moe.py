"""A mixture of experts: each token goes through the few gated MLPs that a router picks for it, and no others are read.

Tokens are sorted by expert. On TPU their products are grouped (`jax.lax.ragged_dot_general`). Elsewhere XLA makes that
one dense, which multiplies every token with every expert, so there a loop takes blocks of rows of one expert each, as
many as there are: README, decision 9.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.layers.linear import Linear
from jaxpaged.layers.mlp import ACTIVATIONS
from jaxpaged.sharding import sum_over
from pallas_kernels import linear_at, target_platform

LEAST_BLOCK, LARGEST_BLOCK = 8, 128
"""Rows of a block, between which lies the expected number of rows of an expert."""


class SparseMLP(nnx.Module):
    """`sum of weight * expert(x)` over the experts with the largest router probabilities (Shazeer et al. 2017)."""

    def __init__(
        self,
        model_dim: int,
        expert_dim: int,
        *,
        num_experts: int,
        num_experts_per_token: int,
        normalises_weights: bool,
        activation: str,
        dtype: DTypeLike,
    ) -> None:
        """With `normalises_weights` those of a token's experts add up to 1; else they are their probabilities."""
        self.router = Linear(model_dim, num_experts, use_bias=False, dtype=dtype)
        self.experts = Experts(model_dim, expert_dim, num_experts=num_experts, activation=activation, dtype=dtype)
        self.num_experts_per_token = num_experts_per_token
        self.normalises_weights = normalises_weights

    def __call__(self, hidden: Float[Array, "tokens model_dim"]) -> Float[Array, "tokens model_dim"]:
        probabilities = jax.nn.softmax(self.router.sums(hidden), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.num_experts_per_token)
        if self.normalises_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        rows = hidden[order // self.num_experts_per_token]
        counts = jnp.zeros(probabilities.shape[-1], jnp.int32).at[chosen.reshape(-1)].add(1)
        outputs = self.experts(rows, counts)[jnp.argsort(order)].reshape(*chosen.shape, -1)
        weighted = jnp.sum(outputs.astype(jnp.float32) * weights[..., None], axis=1)
        return sum_over(weighted, "mlp").astype(hidden.dtype)


class Experts(nnx.Module):
    """Gated MLPs side by side; kernels are [experts, out_dim, in_dim]."""

    def __init__(
        self, model_dim: int, expert_dim: int, *, num_experts: int, activation: str, dtype: DTypeLike
    ) -> None:
        self.gate = nnx.Param(jnp.zeros((num_experts, expert_dim, model_dim), dtype), axes=(None, "mlp", None))
        self.up = nnx.Param(jnp.zeros((num_experts, expert_dim, model_dim), dtype), axes=(None, "mlp", None))
        self.down = nnx.Param(jnp.zeros((num_experts, model_dim, expert_dim), dtype), axes=(None, None, "mlp"))
        self.activation = activation

    def __call__(
        self, rows: Float[Array, "rows model_dim"], counts: Int[Array, " experts"], implementation: str | None = None
    ) -> Float[Array, "rows model_dim"]:
        """Return each row's output; rows are sorted by expert, `counts` says how many each expert has.

        Where `expert_dim` is cut over devices, that is the part of the sum that this device has.

        `implementation` is a name in IMPLEMENTATIONS, by default the one for the platform.
        """
        if implementation is None:
            implementation = "grouped" if target_platform() == "tpu" else "blocks"
        kernels = (self.gate[...], self.up[...], self.down[...])
        return IMPLEMENTATIONS[implementation](rows, counts, kernels, ACTIVATIONS[self.activation])


Kernels = tuple[
    Float[Array, "experts expert_dim model_dim"],
    Float[Array, "experts expert_dim model_dim"],
    Float[Array, "experts model_dim expert_dim"],
]
Activation = Callable[[Array], Array]


def block_size(num_rows: int, num_experts: int) -> int:
    """Return the rows of a block: a power of two, no smaller than the rows an expert has if all have as many."""
    return min(max(1 << (-(-num_rows // num_experts) - 1).bit_length(), LEAST_BLOCK), LARGEST_BLOCK)


def in_blocks(
    rows: Float[Array, "rows model_dim"], counts: Int[Array, " experts"], kernels: Kernels, activation: Activation
) -> Float[Array, "rows model_dim"]:
    """Take blocks of rows in turn, each through its expert's kernels; experts without rows are not read.

    A block begins at a row of its expert and may run over its end: what it writes there is written again, later, by
    the expert whose rows they are. So nothing is padded or masked.
    """
    num_rows, num_experts = rows.shape[0], counts.shape[0]
    size = block_size(num_rows, num_experts)
    padded = jnp.concatenate([rows, jnp.zeros((size, rows.shape[1]), rows.dtype)])
    first_rows = jnp.cumsum(counts) - counts
    blocks = (counts + size - 1) // size
    last_blocks = jnp.cumsum(blocks)

    def take(index: Array, outputs: Array) -> Array:
        expert = jnp.searchsorted(last_blocks, index, side="right").astype(jnp.int32)
        start = first_rows[expert] + (index - last_blocks[expert] + blocks[expert]) * size
        block = jax.lax.dynamic_slice_in_dim(padded, start, size)
        gate, up, down = kernels
        inner = (activation(linear_at(block, gate, expert)) * linear_at(block, up, expert)).astype(rows.dtype)
        result = linear_at(inner, down, expert).astype(rows.dtype)
        return jax.lax.dynamic_update_slice_in_dim(outputs, result, start, 0)

    return jax.lax.fori_loop(0, last_blocks[-1], take, jnp.zeros_like(padded))[:num_rows]


def grouped(
    rows: Float[Array, "rows model_dim"], counts: Int[Array, " experts"], kernels: Kernels, activation: Activation
) -> Float[Array, "rows model_dim"]:
    """Multiply each group of rows with its expert's kernels in one product, which TPUs have a kernel for."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def product(inputs: Array, kernel: Array) -> Array:
        return jax.lax.ragged_dot_general(
            inputs, kernel, counts, dimensions, preferred_element_type=jnp.float32
        )

    gate, up, down = kernels
    inner = (activation(product(rows, gate)) * product(rows, up)).astype(rows.dtype)
    return product(inner, down).astype(rows.dtype)


IMPLEMENTATIONS: Mapping[str, Callable[..., Array]] = MappingProxyType({"blocks": in_blocks, "grouped": grouped})
