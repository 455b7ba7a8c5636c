"""A debug mode for block ids: what a kernel reads and writes without looking, looked at on the host.

Kernels follow block tables and slots as they stand, so a wrong id reads or overwrites another sequence's keys, or
memory that is none of the cache's. These checks cost a transfer to the host and some numpy, and nothing where they are
not called. They need values; inside a jitted step a callback brings them:

    jax.debug.callback(partial(check_metadata, num_blocks=num_blocks, block_size=block_size), metadata)
"""

from typing import Any

import jax
import numpy as np

from pallas_kernels.arguments import check_count
from pallas_kernels.paged_attention.metadata import AttentionMetadata


def check_metadata(
    metadata: AttentionMetadata, *, num_blocks: int, block_size: int, window: int | None = None
) -> None:
    """Raises ValueError for the first fault of a batch that `paged_attention` is to serve with a cache of this size.

    Found are lengths that are not those of the table and the token axis, block ids that are none, the null block where
    a live token is kept, slots that are not the table's, two tokens in one slot, and tiles that do not cover the
    tokens of chunks exactly once. A token that lies before the `window` of every query is not live.
    """
    tables, contexts, starts, slots, tile_sequences, tile_starts, tile_lens = (
        _values(getattr(metadata, name), name)
        for name in (
            "block_tables",
            "context_lens",
            "query_starts",
            "slot_mapping",
            "tile_sequences",
            "tile_starts",
            "tile_lens",
        )
    )
    num_decodes = int(_values(metadata.num_decodes, "num_decodes"))
    num_tiles = int(_values(metadata.num_tiles, "num_tiles"))
    check_count("num_blocks", num_blocks)
    check_count("block_size", block_size)
    if metadata.key_chunk_tokens % block_size:
        raise ValueError(
            f"key_chunk_tokens={metadata.key_chunk_tokens} is no multiple of block_size={block_size}: a chunk of keys "
            "is made of whole blocks"
        )
    _check_lengths(tables, contexts, starts, slots, num_decodes, block_size)
    _check_tables(tables, contexts, starts, num_blocks, block_size, window)
    _check_slots(tables, contexts, starts, slots, num_blocks, block_size)
    if not 0 <= num_tiles <= tile_sequences.shape[0]:
        raise ValueError(f"num_tiles={num_tiles} of {tile_sequences.shape[0]} tile slots: it must be 0 to that many")
    tiles = np.stack([tile_sequences, tile_starts, tile_lens], axis=1)[:num_tiles]
    _check_tiles(tiles, starts, num_decodes, metadata.tile_size)


def check_copies(num_blocks: int, *, sources: Any = None, targets: Any = None) -> None:
    """Raises ValueError for the first wrong id of a `copy_blocks`, a `gather_blocks` (sources) or a `scatter_blocks`.

    Padding rows have the null block, 0, on both sides; targets are distinct but for these.
    """
    sides = {"source": sources, "target": targets}
    found = {name: _values(ids, f"{name}s") for name, ids in sides.items() if ids is not None}
    check_count("num_blocks", num_blocks)
    for name, ids in found.items():
        if ids.ndim != 1:
            raise ValueError(f"{name}s have the shape {ids.shape}: they must be one axis of block ids")
        for row in np.flatnonzero((ids < 0) | (ids >= num_blocks))[:1]:
            raise ValueError(
                f"copy {row} has {name} block {ids[row]}, but the cache has blocks 0 to {num_blocks - 1}: pass ids of "
                "its own"
            )
    if len(found) == 2:
        source, target = found["source"], found["target"]
        if source.shape != target.shape:
            raise ValueError(f"{source.size} sources for {target.size} targets: pad both with 0 to the same length")
        for row in np.flatnonzero((source == 0) != (target == 0))[:1]:
            raise ValueError(
                f"copy {row} goes from block {source[row]} to {target[row]}: block 0 is the null block, which is "
                "copied to itself only, as padding"
            )
    if "target" in found:
        row = _first_repeated(np.where(found["target"] == 0, -1 - np.arange(found["target"].size), found["target"]))
        if row is not None:
            raise ValueError(
                f"copy {row} has target block {found['target'][row]}, as an earlier one: only one of them would stay, "
                "so targets are distinct"
            )


def _values(array: Any, name: str) -> np.ndarray:
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{name} has no values while a program is traced: check before the jitted call, or inside it through "
            "jax.debug.callback"
        )
    values = np.asarray(array)
    if not np.issubdtype(values.dtype, np.integer) and values.size:
        raise ValueError(f"{name} is {values.dtype}{values.shape}: it must be of whole numbers")
    return values.astype(np.int64)


def _check_lengths(
    tables: np.ndarray, contexts: np.ndarray, starts: np.ndarray, slots: np.ndarray, num_decodes: int, block_size: int
) -> None:
    num_seqs, num_tokens = contexts.shape[0], slots.shape[0]
    if tables.shape[0] != num_seqs or starts.shape[0] != num_seqs + 1:
        raise ValueError(
            f"{num_seqs} context_lens, {tables.shape[0]} rows of block_tables and {starts.shape[0]} query_starts: "
            "there must be one row a sequence and one start more"
        )
    query_lens = np.diff(starts)
    if starts[0] != 0 or (query_lens < 0).any() or starts[-1] > num_tokens:
        raise ValueError(
            f"query_starts={starts.tolist()} must begin with 0, never fall, and end at {num_tokens} tokens at most"
        )
    room = tables.shape[1] * block_size
    for sequence in np.flatnonzero((contexts < query_lens) | (contexts > room))[:1]:
        raise ValueError(
            f"sequence {sequence} has {query_lens[sequence]} new of {contexts[sequence]} tokens, and its row of the "
            f"block table holds {room}: it needs new <= context <= what the row holds"
        )
    if not 0 <= num_decodes <= num_seqs or (query_lens[:num_decodes] != 1).any():
        raise ValueError(
            f"num_decodes={num_decodes}, but the first sequences have {query_lens[: max(num_decodes, 0)].tolist()} new "
            "tokens: decodes come first and bring one each"
        )


def _check_tables(
    tables: np.ndarray, contexts: np.ndarray, starts: np.ndarray, num_blocks: int, block_size: int, window: int | None
) -> None:
    # rows without new tokens are padding: nobody reads them
    num_used = np.where(np.diff(starts) > 0, -(-contexts // block_size), 0)
    columns = np.arange(tables.shape[1])
    is_used = columns < num_used[:, None]
    lowest = np.ones_like(tables)
    if window is not None:  # a block before the window of the first query may be anybody's, the null block too
        first_keys = contexts - np.diff(starts) - window + 1
        lowest = np.where((columns + 1) * block_size <= first_keys[:, None], 0, 1)
    for sequence, column in np.argwhere(is_used & ((tables < lowest) | (tables >= num_blocks)))[:1]:
        block = tables[sequence, column]
        reason = "block 0 is the null block, where padding is written" if block == 0 else "there is no such block"
        raise ValueError(
            f"sequence {sequence}, column {column} of its block table: block {block} of a cache of {num_blocks} "
            f"blocks; {reason}: its {contexts[sequence]} tokens need {num_used[sequence]} blocks, of 1 to "
            f"{num_blocks - 1}"
        )


def _check_slots(
    tables: np.ndarray,
    contexts: np.ndarray,
    starts: np.ndarray,
    slots: np.ndarray,
    num_blocks: int,
    block_size: int,
) -> None:
    query_lens = np.diff(starts)
    num_live = int(starts[-1])
    owners = np.repeat(np.arange(contexts.shape[0]), query_lens)
    positions = (contexts - query_lens - starts[:-1])[owners] + np.arange(num_live)
    expected = tables[owners, positions // block_size] * block_size + positions % block_size
    for token in np.flatnonzero(slots[:num_live] != expected)[:1]:
        raise ValueError(
            f"token {token}, at position {positions[token]} of sequence {owners[token]}, has slot {slots[token]} of a "
            f"cache of {num_blocks * block_size} slots, but its block table says {expected[token]}: "
            "slot = block * block_size + offset"
        )
    for token in np.flatnonzero(slots[num_live:])[:1] + num_live:
        raise ValueError(f"token {token} is padding and has slot {slots[token]}: padding has slot 0, in the null block")
    token = _first_repeated(expected)
    if token is not None:
        other = int(np.flatnonzero(expected == expected[token])[0])
        raise ValueError(
            f"token {token} of sequence {owners[token]} and token {other} of sequence {owners[other]} are both written "
            f"to slot {expected[token]}: copy block {expected[token] // block_size} for one of them first"
        )


def _check_tiles(tiles: np.ndarray, starts: np.ndarray, num_decodes: int, tile_size: int) -> None:
    num_seqs = starts.shape[0] - 1
    covered = int(starts[num_decodes])
    for index, (sequence, start, length) in enumerate(tiles.tolist()):
        if not num_decodes <= sequence < num_seqs or not 1 <= length <= tile_size or start != covered:
            raise ValueError(
                f"tile {index} has {length} tokens from token {start} of sequence {sequence}: tiles cover the tokens "
                f"of sequences {num_decodes} to {num_seqs - 1} in order, 1 to {tile_size} each, and the next is token "
                f"{covered}"
            )
        covered = start + length
        if start < starts[sequence] or covered > starts[sequence + 1]:
            raise ValueError(
                f"tile {index} has tokens {start} to {covered - 1}, but sequence {sequence} has tokens "
                f"{starts[sequence]} to {starts[sequence + 1] - 1}: a tile is of one sequence"
            )
    if covered != starts[-1]:
        raise ValueError(
            f"{tiles.shape[0]} tiles end at token {covered} of {starts[-1]}: the tokens behind would never attend"
        )


def _first_repeated(values: np.ndarray) -> int | None:
    """The first position whose value stands at an earlier one too."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(values.size))
    return int(repeated[0]) if repeated.size else None
