"""Which tokens attend to which blocks: the one description of a ragged batch that every implementation reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.arguments import check_count

TILE_SIZE = 64
"""Default query tokens of a chunk tile."""
KEY_CHUNK_TOKENS = 128
"""Default keys a chunk tile handles per turn."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "block_tables",
        "context_lens",
        "query_starts",
        "slot_mapping",
        "num_decodes",
        "tile_sequences",
        "tile_starts",
        "tile_lens",
        "num_tiles",
    ),
    meta_fields=("tile_size", "key_chunk_tokens"),
)
@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """What one step's attention reads beside queries, keys and values. Shapes are static, counts are data.

    The queries of all sequences lie one after the other on the token axis. The first `num_decodes` sequences bring one
    query token each; the others are cut into tiles of up to `tile_size` tokens. The token `t` of sequence `s` stands
    at position `context_lens[s] - query_len(s) + (t - query_starts[s])`.
    """

    block_tables: Int[Array, "seqs blocks_per_seq"]
    """Logical block -> block id. What entries past a sequence's last block name is never used; with a window, neither
    is what entries of blocks name that lie wholly before the window of the sequence's first query: any block of the
    cache, the null block too, may stand there."""
    context_lens: Int[Array, "seqs"]
    """Tokens in the cache after this step; 0 in padding rows."""
    query_starts: Int[Array, "seqs_plus_1"]
    """First token of each sequence; the last entry, and those of padding rows, is the number of real tokens."""
    slot_mapping: Int[Array, "tokens"]
    """Where a token's key and value go: block * block_size + offset; padding tokens have slot 0.

    Slots outside the null block are distinct: an implementation may tell XLA so, and what is in a slot that two tokens
    share is then anything. `check_metadata` finds such slots."""
    num_decodes: Int[Array, ""]
    """Sequences 0 .. num_decodes - 1 are decodes: sequence i is token i."""
    tile_sequences: Int[Array, "tiles"]
    """The sequence of each tile."""
    tile_starts: Int[Array, "tiles"]
    """The first token of each tile, on the token axis; ascending."""
    tile_lens: Int[Array, "tiles"]
    """Tokens of each tile, 1 .. tile_size."""
    num_tiles: Int[Array, ""]
    """Tiles in use: the first ones."""
    tile_size: int
    """Most tokens of a tile (static)."""
    key_chunk_tokens: int
    """Keys a tile handles per turn, counted from position 0 (static): a number of tokens, a multiple of the block
    size, so that results do not depend on the block size."""


def make_metadata(
    *,
    block_tables: np.ndarray,
    context_lens: Sequence[int],
    query_lens: Sequence[int],
    block_size: int,
    num_tokens: int | None = None,
    num_seqs: int | None = None,
    tile_size: int = TILE_SIZE,
    key_chunk_tokens: int = KEY_CHUNK_TOKENS,
    has_decodes: bool = True,
) -> AttentionMetadata:
    """The metadata of a batch of lengths and block tables, for tests and simple hosts.

    Leading sequences with one query token become decodes unless `has_decodes` is False. `num_tokens` and `num_seqs`
    pad to a bucket. Raises ValueError for numbers that are not whole, and where a sequence has no row of `block_tables`
    or does not fit it or the bucket.
    """
    num_seqs = len(context_lens) if num_seqs is None else num_seqs
    for name, lengths in (("context_lens", context_lens), ("query_lens", query_lens)):
        for seq, length in enumerate(lengths):
            check_count(f"{name}[{seq}]", length)
    total = int(sum(query_lens))
    num_tokens = total if num_tokens is None else num_tokens
    for name, count, least in (
        ("block_size", block_size, 1), ("num_tokens", num_tokens, 0), ("num_seqs", num_seqs, 0),
        ("tile_size", tile_size, 1), ("key_chunk_tokens", key_chunk_tokens, 1),
    ):  # fmt: skip
        check_count(name, count, least)
    if key_chunk_tokens % block_size:
        raise ValueError(f"key_chunk_tokens={key_chunk_tokens} must be a multiple of block_size={block_size}")
    if len(context_lens) != len(query_lens):
        raise ValueError(
            f"{len(context_lens)} context_lens and {len(query_lens)} query_lens: there must be one of each a sequence"
        )
    block_tables = np.asarray(block_tables)
    if block_tables.ndim != 2 or not np.issubdtype(block_tables.dtype, np.integer):
        raise ValueError(
            f"block_tables is {block_tables.dtype}{block_tables.shape}: it must be whole numbers [seqs, blocks_per_seq]"
        )
    if not len(context_lens) <= block_tables.shape[0] <= num_seqs or total > num_tokens:
        raise ValueError(
            f"{total} tokens of {len(query_lens)} sequences and {block_tables.shape[0]} rows of block_tables do not "
            f"fit a bucket of {num_tokens} tokens and {num_seqs} sequences: each sequence needs a row, and each row "
            "and token a place in the bucket"
        )
    tables = np.zeros((num_seqs, block_tables.shape[1]), np.int32)
    tables[: block_tables.shape[0]] = block_tables
    contexts = np.zeros(num_seqs, np.int32)
    contexts[: len(context_lens)] = context_lens
    starts = np.full(num_seqs + 1, total, np.int32)
    starts[: len(query_lens) + 1] = np.concatenate([[0], np.cumsum(query_lens)])
    num_decodes = 0
    while has_decodes and num_decodes < len(query_lens) and query_lens[num_decodes] == 1:
        num_decodes += 1
    slots = np.zeros(num_tokens, np.int32)
    tiles: list[tuple[int, int, int]] = []
    for seq, (context, length) in enumerate(zip(context_lens, query_lens, strict=True)):
        if not 1 <= length <= context <= tables.shape[1] * block_size:
            raise ValueError(
                f"sequence {seq} has {length} new of {context} tokens: it needs 1 <= new <= context <= "
                f"{tables.shape[1] * block_size}, what its row of the block table holds"
            )
        positions = np.arange(context - length, context)
        first = starts[seq]
        slots[first : first + length] = tables[seq, positions // block_size] * block_size + positions % block_size
        if seq >= num_decodes:
            tiles += [(seq, first + i, min(tile_size, length - i)) for i in range(0, length, tile_size)]
    padded = np.zeros((max(-(-num_tokens // tile_size) + num_seqs, 1), 3), np.int32)
    padded[: len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3)
    return AttentionMetadata(
        block_tables=jnp.asarray(tables),
        context_lens=jnp.asarray(contexts),
        query_starts=jnp.asarray(starts),
        slot_mapping=jnp.asarray(slots),
        num_decodes=jnp.asarray(num_decodes, jnp.int32),
        tile_sequences=jnp.asarray(padded[:, 0]),
        tile_starts=jnp.asarray(padded[:, 1]),
        tile_lens=jnp.asarray(padded[:, 2]),
        num_tiles=jnp.asarray(len(tiles), jnp.int32),
        tile_size=tile_size,
        key_chunk_tokens=key_chunk_tokens,
    )
