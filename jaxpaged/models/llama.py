"""Llama 1, 2 and 3.x (and whatever shares their graph): pre-norm decoder, rotary positions, gated MLP."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpaged.layers.attention import Attention, AttentionFunction
from jaxpaged.layers.embedding import Embedding
from jaxpaged.layers.linear import Linear
from jaxpaged.layers.mlp import GatedMLP
from jaxpaged.layers.norm import RMSNorm
from jaxpaged.layers.rope import build_rope_table, rotary_angles
from jaxpaged.models.config import ModelConfig
from jaxpaged.sharding import gather


class LlamaLayer(nnx.Module):
    """One decoder layer: attention and MLP, each on a normalised copy, each added back."""

    def __init__(self, config: ModelConfig) -> None:
        self.attention_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=config.dtype)
        self.attention = Attention(
            config.model_dim,
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            use_bias=config.attention_bias,
            dtype=config.dtype,
        )
        self.mlp_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=config.dtype)
        self.mlp = GatedMLP(
            config.model_dim,
            config.mlp_dim,
            activation=config.activation,
            use_bias=config.mlp_bias,
            dtype=config.dtype,
        )

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
        """Return the tokens that `rows` names, or all, and the cache with the keys and values of all of them."""
        attended, kv = self.attention(self.attention_norm(hidden), cosines, sines, kv, metadata, attention, rows)
        hidden = (hidden if rows is None else hidden[rows]) + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), kv


@functools.partial(jax.jit, static_argnames=("graph", "attention"))
def apply_layer(
    graph: Any,
    state: Any,
    hidden: Float[Array, "tokens model_dim"],
    cosines: Float[Array, "tokens half_head_dim"],
    sines: Float[Array, "tokens half_head_dim"],
    kv: Any,
    metadata: Any,
    attention: AttentionFunction,
    rows: Int[Array, " rows"] | None = None,
) -> tuple[Float[Array, "kept model_dim"], Any]:
    """Run the layer that `graph` and `state` make up (the two halves of `nnx.split`).

    All layers of a model have equal graphs, so that within a step this is traced and lowered once, whatever their
    number (and once more for a last layer with `rows`): the step calls one inner function many times.
    """
    return nnx.merge(graph, state)(hidden, cosines, sines, kv, metadata, attention, rows)


class LlamaForCausalLM(nnx.Module):
    """The decoder with its embedding and head. Parameters start as zeros and ones: fill them before use."""

    def __init__(self, config: ModelConfig, *, max_model_len: int | None = None) -> None:
        """Build for sequences of up to `max_model_len` tokens (only length-dependent rope scalings read it)."""
        self.embedding = Embedding(config.vocab_size, config.model_dim, dtype=config.dtype)
        self.layers = nnx.List([LlamaLayer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=config.dtype)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(config.model_dim, config.vocab_size, use_bias=False, dtype=config.dtype, axes=("vocab", None))
        )
        self.vocab_size = config.vocab_size
        self.rope = build_rope_table(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            max_position_embeddings=config.max_position_embeddings,
            max_model_len=max_model_len,
        )

    def __call__(
        self,
        token_ids: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        kv: Sequence[Any],
        metadata: Any,
        attention: AttentionFunction,
        rows: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "kept model_dim"], tuple[Any, ...]]:
        """Return the normalised hidden state of each token, and the layer caches with the new tokens written.

        `kv` has one cache per layer, `metadata` says which token belongs to which sequence; both go to `attention`
        untouched. Tokens are packed: there is no batch axis and no phase. `rows` are the tokens whose states are
        wanted, in the order wanted (all of them by default).
        """
        cosines, sines = rotary_angles(positions, self.rope)
        hidden = self.embedding(token_ids)
        # where only some are wanted, nothing reads what the last layer makes of the others but their keys and values
        last_rows = rows if rows is not None and rows.shape[0] < token_ids.shape[0] else None
        caches = []
        for index, (layer, layer_kv) in enumerate(zip(self.layers, kv, strict=True)):
            graph, state = nnx.split(layer)
            layer_rows = last_rows if index == len(self.layers) - 1 else None
            hidden, layer_kv = apply_layer(
                graph, state, hidden, cosines, sines, layer_kv, metadata, attention=attention, rows=layer_rows
            )
            caches.append(layer_kv)
        if rows is not None and last_rows is None:
            hidden = hidden[rows]
        return self.norm(hidden), tuple(caches)

    def logits(self, hidden: Float[Array, "rows model_dim"]) -> Float[Array, "rows vocab"]:
        """Return the float32 logits of the rows that need them."""
        if self.head is None:
            return self.embedding.logits(hidden)
        return gather(self.head.sums(hidden), "vocab", dimension=1)[:, : self.vocab_size]
