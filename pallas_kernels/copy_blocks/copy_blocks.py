"""Copies of whole blocks, on any pytree of caches whose leaves have the block as their leading axis.

Ids are padded to a bucket with block 0, the null block. A scatter writes nothing for such a row: its id is replaced
by one behind the cache, each row by another, so that all indices of a scatter are distinct and XLA may be told so.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.arguments import check_ids


def gather_blocks(kv: Any, ids: Int[Array, "copies"]) -> Any:
    """The blocks `ids`, in order, as the same tree with leading axis len(ids). `kv` is only read."""
    check_ids("ids", ids)
    # ids are the caller's own and in range; "clip" keeps a wrong one from reading outside the array
    return jax.tree.map(lambda leaf: leaf.at[ids].get(mode="clip", wrap_negative_indices=False), kv)


def scatter_blocks(kv: Any, ids: Int[Array, "copies"], staged: Any) -> Any:
    """`kv` with staged[i] in block ids[i]. Donate `kv` to have it done in place.

    Ids other than 0 are distinct; rows of block 0 write nothing. Raises ValueError for ids that are no int32 array of
    one axis, and when the trees, block shapes or dtypes of `kv` and `staged` differ.
    """
    check_ids("ids", ids)
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
    written = [_write(leaf, ids, blocks) for leaf, blocks in zip(leaves, staged_leaves, strict=True)]
    return jax.tree.unflatten(tree, written)


def copy_blocks(kv: Any, sources: Int[Array, "copies"], targets: Int[Array, "copies"]) -> Any:
    """`kv` with block sources[i] copied to block targets[i]; every read comes before every write.

    Donate `kv` to have it done in place; the blocks in flight are the only temporary memory. Targets are distinct,
    padding rows (0 -> 0) apart; a block may be the source of several copies, and a target of one and source of another.
    """
    check_ids("sources", sources)
    check_ids("targets", targets)
    if sources.shape != targets.shape:
        raise ValueError(f"{sources.shape} sources for {targets.shape} targets: pad both with 0 to the same length")
    return scatter_blocks(kv, targets, gather_blocks(kv, sources))


def _write(leaf: Array, ids: Int[Array, "copies"], blocks: Array) -> Array:
    behind = leaf.shape[0] + jnp.arange(ids.shape[0], dtype=ids.dtype)
    # unless indices are distinct, a GPU writes 16-bit elements by compare-and-swap, one at a time
    return leaf.at[jnp.where(ids == 0, behind, ids)].set(
        blocks, mode="drop", unique_indices=True, wrap_negative_indices=False
    )
