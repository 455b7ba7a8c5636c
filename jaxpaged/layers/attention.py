"""Self-attention: project, rotate, attend to the paged cache, project back."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.layers.linear import Linear
from jaxpaged.layers.norm import Norm
from jaxpaged.layers.rope import Angles, rotate

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
        use_output_bias: bool | None = None,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        is_interleaved: bool = False,
    ) -> None:
        """Build; None means: as `use_bias`, no norm, `head_dim ** -0.5`, every token before, no cap.

        A query or key norm is of one head, or of all heads together, as its dimension says. `window` counts the token
        itself. `is_interleaved` says which dimensions are rotated together (see `rope.rotate`).
        """
        self.query = Linear(model_dim, num_q_heads * head_dim, use_bias=use_bias, dtype=dtype, axes=("q_heads", None))
        kv_dim, kv_axes = num_kv_heads * head_dim, ("kv_heads", None)
        self.key = Linear(model_dim, kv_dim, use_bias=use_bias, dtype=dtype, axes=kv_axes)
        self.value = Linear(model_dim, kv_dim, use_bias=use_bias, dtype=dtype, axes=kv_axes)
        use_output_bias = use_bias if use_output_bias is None else use_output_bias
        self.output = Linear(
            num_q_heads * head_dim, model_dim, use_bias=use_output_bias, dtype=dtype, axes=(None, "q_heads")
        )
        self.query_norm = query_norm
        self.key_norm = key_norm
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        self.soft_cap = soft_cap
        self.is_interleaved = is_interleaved

    def __call__(
        self,
        hidden: Float[Array, "tokens model_dim"],
        angles: Angles | None,
        kv: Any,
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], Any]:
        """Return the attended tokens, or those that `rows` names, and the cache with the keys and values of all.

        Without `angles` nothing is rotated.
        """
        tokens = hidden.shape[0]
        query = self._heads(self.query(hidden), self.query_norm, angles)
        key = self._heads(self.key(hidden), self.key_norm, angles)
        value = self.value(hidden).reshape(tokens, -1, self.head_dim)
        attended, kv = attention(
            query, key, value, kv, metadata, scale=self.scale, window=self.window, soft_cap=self.soft_cap
        )
        attended = attended.reshape(tokens, -1)
        return self.output(attended if rows is None else attended[rows]), kv

    def _heads(
        self, projected: Float[Array, "tokens dim"], norm: Norm | None, angles: Angles | None
    ) -> Float[Array, "tokens heads head_dim"]:
        """Return the heads of a query or key, normalised and rotated."""
        if norm is not None and norm.dim != self.head_dim:
            projected = norm(projected)
        elif norm is not None:
            projected = norm(projected.reshape(projected.shape[0], -1, norm.dim)).reshape(projected.shape)
        heads = projected.reshape(projected.shape[0], -1, self.head_dim)
        return heads if angles is None else rotate(heads, *angles, is_interleaved=self.is_interleaved)
