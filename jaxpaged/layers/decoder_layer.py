"""Decoder layers: how attention and MLP, their norms and the residual stream go together.

All have one signature, `layer(hidden, angles, kv, metadata, attention, rows)`, and return the tokens that `rows` names,
or all, with the cache that holds the keys and values of all of them.
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpaged.layers.attention import Attention, AttentionFunction
from jaxpaged.layers.norm import Norm
from jaxpaged.layers.rope import Angles


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each on a normalised copy, each result added back.

    A model may leave out the norms before (None), and normalise the results before they are added.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        mlp: Any,
        attention_norm: Norm | None,
        mlp_norm: Norm | None,
        attention_output_norm: Norm | None = None,
        mlp_output_norm: Norm | None = None,
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_output_norm = attention_output_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_output_norm = mlp_output_norm

    def __call__(
        self,
        hidden: Float[Array, "tokens model_dim"],
        angles: Angles | None,
        kv: Any,
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], Any]:
        attended, kv = self.attention(
            _normed(self.attention_norm, hidden), angles, kv, metadata, attention, rows
        )
        hidden = _kept(hidden, rows) + _normed(self.attention_output_norm, attended)
        return hidden + _normed(self.mlp_output_norm, self.mlp(_normed(self.mlp_norm, hidden))), kv


class ParallelLayer(nnx.Module):
    """Attention and MLP side by side on the same input, both added back; with one norm for the two, or one each."""

    def __init__(
        self, *, attention: Attention, mlp: Any, attention_norm: Norm, mlp_norm: Norm | None = None
    ) -> None:
        """Without `mlp_norm` the MLP reads what `attention_norm` gives."""
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self,
        hidden: Float[Array, "tokens model_dim"],
        angles: Angles | None,
        kv: Any,
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], Any]:
        normed = self.attention_norm(hidden)
        attended, kv = self.attention(normed, angles, kv, metadata, attention, rows)
        hidden = _kept(hidden, rows)
        mlp_input = _kept(normed, rows) if self.mlp_norm is None else self.mlp_norm(hidden)
        return hidden + attended + self.mlp(mlp_input), kv


class PostNormLayer(nnx.Module):
    """Attention, then MLP, each result added back, and the sum normalised (the order of the first transformer)."""

    def __init__(self, *, attention: Attention, mlp: Any, attention_norm: Norm, mlp_norm: Norm) -> None:
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm

    def __call__(
        self,
        hidden: Float[Array, "tokens model_dim"],
        angles: Angles | None,
        kv: Any,
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], Any]:
        attended, kv = self.attention(hidden, angles, kv, metadata, attention, rows)
        hidden = self.attention_norm(_kept(hidden, rows) + attended)
        return self.mlp_norm(hidden + self.mlp(hidden)), kv


def _normed(norm: Norm | None, hidden: Float[Array, "tokens model_dim"]) -> Float[Array, "tokens model_dim"]:
    return hidden if norm is None else norm(hidden)


def _kept(
    hidden: Float[Array, "tokens model_dim"], rows: Int[Array, " rows"] | None
) -> Float[Array, "kept model_dim"]:
    return hidden if rows is None else hidden[rows]
