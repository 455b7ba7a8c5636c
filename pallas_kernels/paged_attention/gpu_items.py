"""How decodes are shared among programs: cut along their keys into items of about equal work."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Items(NamedTuple):
    """Pieces of decodes, sequence after sequence."""

    sequences: Int[Array, "items"]
    first_chunks: Int[Array, "items"]
    end_chunks: Int[Array, "items"]
    """One more than the last."""
    first_items: Int[Array, "seqs_plus_1"]
    """The first item of each sequence, which ends where the next one's begin; the last entry is their number."""


def cut_into_items(
    lens: Int[Array, "seqs"], chunk: int, window: int | None, *, num_items: int, min_chunks: int
) -> Items:
    """Decodes of `lens` tokens (0 where there is none), cut into about `num_items`, or one each where they are more.

    An item has `min_chunks` chunks or more, unless it is the only one of its sequence: then it has what there is.
    """
    num_seqs = lens.shape[0]
    skipped = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0) // chunk
    num_chunks = (lens + chunk - 1) // chunk - skipped
    share = jnp.maximum((num_chunks.sum(dtype=jnp.int32) + num_items - 1) // num_items, min_chunks)
    counts = (num_chunks + share - 1) // share
    first_items = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    # rounding up adds less than one item to each sequence
    item = jnp.arange(num_seqs + num_items, dtype=jnp.int32)
    sequences = jnp.minimum((first_items[1:] <= item[:, None]).sum(1, dtype=jnp.int32), num_seqs - 1)
    part, count = item - first_items[sequences], jnp.maximum(counts[sequences], 1)
    first, chunks = skipped[sequences], num_chunks[sequences]
    return Items(sequences, first + part * chunks // count, first + (part + 1) * chunks // count, first_items)
