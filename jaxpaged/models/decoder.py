"""The decoder that every architecture is: embedding, layers, norm, head. An architecture's file says of what parts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxpaged.layers.attention import AttentionFunction
from jaxpaged.layers.embedding import Embedding, LearnedPositions, ProjectedEmbedding, whole_vocabulary
from jaxpaged.layers.linear import Linear
from jaxpaged.layers.norm import Norm
from jaxpaged.layers.rope import Angles, RopeTable, rotary_angles
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.layer_groups import place_of


@functools.partial(jax.jit, static_argnames=("graph", "attention"))
def apply_layer(
    graph: Any,
    state: Any,
    hidden: Float[Array, "tokens model_dim"],
    angles: Angles | None,
    kv: Any,
    metadata: Any,
    attention: AttentionFunction,
    rows: Int[Array, " rows"] | None = None,
) -> tuple[Float[Array, "kept model_dim"], Any]:
    """Run the layer that `graph` and `state` make up (the two halves of `nnx.split`).

    Layers of one kind have equal graphs, so that within a step each kind is traced and lowered once, whatever the
    number of layers (and once more for a last layer with `rows`): the step calls one inner function many times.
    """
    return nnx.merge(graph, state)(hidden, angles, kv, metadata, attention, rows)


class Decoder(nnx.Module):
    """The layers with embedding and head. Parameters start as zeros and ones: fill them before use."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[nnx.Module],
        *,
        norm: Norm | None,
        ropes: Sequence[RopeTable | None] | None = None,
        embedding: Embedding | ProjectedEmbedding | None = None,
        positions: LearnedPositions | None = None,
        use_head_bias: bool = False,
        logit_soft_cap: float | None = None,
    ) -> None:
        """Build of these parts.

        `ropes` are the rotary frequencies of each layer, None for one that rotates nothing (and for all of them).
        `embedding` is a plain table if not given. Learned `positions` are added to it.
        """
        if len(layers) != config.num_layers:
            raise ValueError(f"{len(layers)} layers were built for num_layers={config.num_layers}")
        self.config = config
        self.embedding = (
            Embedding(config.vocab_size, config.model_dim, dtype=config.dtype) if embedding is None else embedding
        )
        self.positions = positions
        self.layers = nnx.List(layers)
        self.norm = norm
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                config.model_dim, config.vocab_size, use_bias=use_head_bias, dtype=config.dtype, axes=("vocab", None)
            )
        )
        self.vocab_size = config.vocab_size
        self.ropes = (None,) * len(layers) if ropes is None else tuple(ropes)
        self.logit_soft_cap = logit_soft_cap

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

        `kv` has one cache per layer, or per slot where `metadata` puts layers in groups (`models/layer_groups.py`);
        `metadata` says which token belongs to which sequence. Both go to `attention` untouched. Tokens are packed:
        there is no batch axis and no phase. `rows` are the tokens whose states are wanted, in the order wanted (all
        of them by default).
        """
        angles = {table: rotary_angles(positions, table) for table in dict.fromkeys(self.ropes) if table is not None}
        hidden = self.embedding(token_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        # where only some are wanted, nothing reads what the last layer makes of the others but their keys and values
        last_rows = rows if rows is not None and rows.shape[0] < token_ids.shape[0] else None
        caches = list(kv)
        for index, (layer, table) in enumerate(zip(self.layers, self.ropes, strict=True)):
            slot, layer_metadata = place_of(metadata, index)
            graph, state = nnx.split(layer)
            layer_rows = last_rows if index == len(self.layers) - 1 else None
            layer_angles = None if table is None else angles[table]
            hidden, caches[slot] = apply_layer(
                graph, state, hidden, layer_angles, caches[slot], layer_metadata, attention=attention, rows=layer_rows
            )
        if rows is not None and last_rows is None:
            hidden = hidden[rows]
        return hidden if self.norm is None else self.norm(hidden), tuple(caches)

    def logits(self, hidden: Float[Array, "rows model_dim"]) -> Float[Array, "rows vocab"]:
        """Return the float32 logits of the rows that need them."""
        if self.head is None:
            logits = self.embedding.logits(hidden)
        else:
            logits = whole_vocabulary(self.head.sums(hidden), self.vocab_size)
        return logits if self.logit_soft_cap is None else self.logit_soft_cap * jnp.tanh(logits / self.logit_soft_cap)
