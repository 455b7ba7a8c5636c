"""The token embedding, which is also the output head where a model ties the two."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpaged.sharding import first_index, gather, sum_over
from pallas_kernels import linear


class Embedding(nnx.Module):
    """A table [vocab, model_dim] that is read by row, and by `logits` as a head."""

    def __init__(self, vocab_size: int, model_dim: int, *, dtype: DTypeLike) -> None:
        self.table = nnx.Param(jnp.zeros((vocab_size, model_dim), dtype), axes=("vocab", None))
        self.vocab_size = vocab_size

    def __call__(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """Return the rows of the tokens; an id out of range reads the nearest row (ids are checked at the door)."""
        table = self.table[...]
        rows = jnp.clip(token_ids, 0, self.vocab_size - 1) - first_index("vocab", table.shape[0])
        # a token of another device's part of the vocabulary is zeros here, and theirs is added
        own = table.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return sum_over(own, "vocab")

    def logits(self, hidden: Float[Array, "rows model_dim"]) -> Float[Array, "rows vocab"]:
        """Return `hidden @ table.T` in float32: the table as the kernel of a linear layer."""
        return gather(linear(hidden, self.table[...]), "vocab", dimension=1)[:, : self.vocab_size]
