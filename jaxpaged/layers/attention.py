"""Self-attention: project, rotate, attend to the paged cache, project back."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.layers.linear import Linear
from jaxpaged.layers.rope import rotate

AttentionFunction = Callable[..., tuple[Array, Any]]
"""`attention(query, key, value, kv, metadata, *, scale, window=None, soft_cap=None, sinks=None) -> (output, kv)`: the
contract of `pallas_kernels.paged_attention` with the implementation already chosen. It must be hashable."""


class Attention(nnx.Module):
    """Grouped-query self-attention over the cache of one layer; what the cache is, only `attention` knows."""

    def __init__(
        self,
        model_dim: int,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        use_bias: bool,
        dtype: DTypeLike,
    ) -> None:
        self.query = Linear(model_dim, num_q_heads * head_dim, use_bias=use_bias, dtype=dtype, axes=("q_heads", None))
        kv_dim, kv_axes = num_kv_heads * head_dim, ("kv_heads", None)
        self.key = Linear(model_dim, kv_dim, use_bias=use_bias, dtype=dtype, axes=kv_axes)
        self.value = Linear(model_dim, kv_dim, use_bias=use_bias, dtype=dtype, axes=kv_axes)
        self.output = Linear(
            num_q_heads * head_dim, model_dim, use_bias=use_bias, dtype=dtype, axes=(None, "q_heads")
        )
        self.head_dim = head_dim

    def __call__(
        self,
        hidden: Float[Array, "tokens model_dim"],
        cosines: Float[Array, "tokens half_head_dim"],
        sines: Float[Array, "tokens half_head_dim"],
        kv: Any,
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], Any]:
        """Return the attended tokens, or those that `rows` names, and the cache with the keys and values of all."""
        tokens = hidden.shape[0]
        query = rotate(self.query(hidden).reshape(tokens, -1, self.head_dim), cosines, sines)
        key = rotate(self.key(hidden).reshape(tokens, -1, self.head_dim), cosines, sines)
        value = self.value(hidden).reshape(tokens, -1, self.head_dim)
        attended, kv = attention(query, key, value, kv, metadata, scale=self.head_dim**-0.5)
        attended = attended.reshape(tokens, -1)
        return self.output(attended if rows is None else attended[rows]), kv
