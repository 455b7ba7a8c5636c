"""The token embedding, which is also the output head where a model ties the two, and learned positions."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.layers.linear import Linear
from jaxpaged.sharding import first_index, gather, sum_over
from pallas_kernels import linear


class Embedding(nnx.Module):
    """A table [vocab, model_dim] that is read by row, and by `logits` as a head."""

    def __init__(self, vocab_size: int, model_dim: int, *, dtype: DTypeLike, scale: float | None = None) -> None:
        """Rows are multiplied by `scale`, rounded to their dtype, when they are read; as a head they are not."""
        self.table = nnx.Param(jnp.zeros((vocab_size, model_dim), dtype), axes=("vocab", None))
        self.vocab_size = vocab_size
        self.scale = scale

    def __call__(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """Return the rows of the tokens; an id out of range reads the nearest row (ids are checked at the door)."""
        rows = _rows(self.table[...], token_ids, self.vocab_size)
        return rows if self.scale is None else rows * jnp.asarray(self.scale, rows.dtype)

    def logits(self, hidden: Float[Array, "rows model_dim"]) -> Float[Array, "rows vocab"]:
        """Return `hidden @ table.T` in float32: the table as the kernel of a linear layer."""
        return whole_vocabulary(linear(hidden, self.table[...]), self.vocab_size)


class ProjectedEmbedding(nnx.Module):
    """A table [vocab, embedding_dim] with a projection from each row to model_dim, and another back before the head."""

    def __init__(self, vocab_size: int, embedding_dim: int, model_dim: int, *, dtype: DTypeLike) -> None:
        self.table = nnx.Param(jnp.zeros((vocab_size, embedding_dim), dtype), axes=("vocab", None))
        self.inward = Linear(embedding_dim, model_dim, use_bias=False, dtype=dtype)
        self.outward = Linear(model_dim, embedding_dim, use_bias=False, dtype=dtype)
        self.vocab_size = vocab_size

    def __call__(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """Return the projected rows of the tokens; an id out of range reads the nearest row."""
        return self.inward(_rows(self.table[...], token_ids, self.vocab_size))

    def logits(self, hidden: Float[Array, "rows model_dim"]) -> Float[Array, "rows vocab"]:
        """Return `outward(hidden) @ table.T` in float32."""
        return whole_vocabulary(linear(self.outward(hidden), self.table[...]), self.vocab_size)


def _rows(
    table: Float[Array, "part dim"], token_ids: Int[Array, " tokens"], vocab_size: int
) -> Float[Array, "tokens dim"]:
    """The rows of the tokens in a table of which this device may have a part."""
    rows = jnp.clip(token_ids, 0, vocab_size - 1) - first_index("vocab", table.shape[0])
    # a token of another device's part is zeros here, and theirs is added
    own = table.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return sum_over(own, "vocab")


def whole_vocabulary(logits: Float[Array, "rows part"], vocab_size: int) -> Float[Array, "rows vocab"]:
    """The logits of all tokens from those of each device's part of the vocabulary, which is filled up to be equal."""
    return gather(logits, "vocab", dimension=1)[:, :vocab_size]


class LearnedPositions(nnx.Module):
    """A vector for each position, in a table [offset + positions, model_dim] whose first `offset` rows are not used."""

    def __init__(self, num_positions: int, model_dim: int, *, offset: int, dtype: DTypeLike) -> None:
        self.table = nnx.Param(jnp.zeros((offset + num_positions, model_dim), dtype), axes=(None, None))
        self.offset = offset

    def __call__(self, positions: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """Return the vectors of the positions; one out of range reads the last (lengths are checked at the door)."""
        return self.table[...].at[positions + self.offset].get(mode="clip")
