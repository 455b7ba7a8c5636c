"""Copies of whole blocks, on any pytree of caches whose leaves have the block as their leading axis.

Ids are padded to a bucket with block 0, the null block: it may be written any number of times and nobody reads it,
so a padding row copies 0 -> 0. None of the scatters promises unique indices, because the padding rows share block 0.
"""

from typing import Any

import jax
from jaxtyping import Array, Int


def gather_blocks(kv: Any, ids: Int[Array, "copies"]) -> Any:
    """The blocks `ids`, in order, as the same tree with leading axis len(ids). `kv` is only read."""
    # ids are the caller's own and in range; "clip" keeps a wrong one from reading outside the array
    return jax.tree.map(lambda leaf: leaf.at[ids].get(mode="clip"), kv)


def scatter_blocks(kv: Any, ids: Int[Array, "copies"], staged: Any) -> Any:
    """`kv` with staged[i] in block ids[i]. Donate `kv` to have it done in place.

    Real ids are distinct; among rows of the null block the last one need not win. Raises ValueError when the trees,
    block shapes or dtypes of `kv` and `staged` differ.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(kv)
    staged_leaves, staged_tree = jax.tree.flatten(staged)
    if tree != staged_tree:
        raise ValueError(f"staged blocks have the tree {staged_tree}, the cache {tree}: stage them with gather_blocks")
    for leaf, blocks in zip(leaves, staged_leaves, strict=True):
        if blocks.shape != (ids.shape[0], *leaf.shape[1:]) or blocks.dtype != leaf.dtype:
            raise ValueError(
                f"staged blocks are {blocks.dtype}{blocks.shape}, but {ids.shape[0]} blocks of this cache are "
                f"{leaf.dtype}{(ids.shape[0], *leaf.shape[1:])}: stage them with gather_blocks"
            )
    written = [leaf.at[ids].set(blocks, mode="drop") for leaf, blocks in zip(leaves, staged_leaves, strict=True)]
    return jax.tree.unflatten(tree, written)


def copy_blocks(kv: Any, sources: Int[Array, "copies"], targets: Int[Array, "copies"]) -> Any:
    """`kv` with block sources[i] copied to block targets[i]; every read comes before every write.

    Donate `kv` to have it done in place; the blocks in flight are the only temporary memory. Targets are distinct,
    padding rows (0 -> 0) apart; a block may be the source of several copies, and a target of one and source of another.
    """
    if sources.shape != targets.shape:
        raise ValueError(f"{sources.shape} sources for {targets.shape} targets: pad both with 0 to the same length")
    return scatter_blocks(kv, targets, gather_blocks(kv, sources))
