"""Named real shapes and makers of ragged, NaN-poisoned batches. Tests, bench and tuning all read this list."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.layout import KVLayout
from pallas_kernels.paged_attention.metadata import KEY_CHUNK_TOKENS, TILE_SIZE, AttentionMetadata, make_metadata
from pallas_kernels.paged_attention.quantization import is_quantized


@dataclass(frozen=True)
class HeadShape:
    """The heads of a real model."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


HEAD_SHAPES = {
    "stories260k": HeadShape(8, 4, 8),
    "dim768": HeadShape(12, 4, 64),
    "tinyllama": HeadShape(32, 4, 64),
    "llama3-8b": HeadShape(32, 8, 128),
    "smollm-135m": HeadShape(9, 3, 64),
    "opt-125m": HeadShape(12, 12, 64),
    "phi-2": HeadShape(32, 32, 80),
    "phi-3-mini": HeadShape(32, 32, 96),
    "gemma-2b": HeadShape(8, 1, 256),
    "gpt-oss-20b": HeadShape(64, 8, 64),
}
"""By the name of the model they come from; dim768 is the 110M shape of the benches."""


@dataclass(frozen=True, kw_only=True)
class BatchCase:
    """A ragged batch to be made: who has how many tokens, and every option of the op."""

    name: str
    heads: HeadShape
    sequences: tuple[tuple[int, int], ...]
    """(context length after the step, new tokens) of each sequence; decodes first."""
    block_size: int = 16
    dtype: str = "float32"
    """Of the cache."""
    input_dtype: str | None = None
    """Of query, keys and values; None is that of the cache, or bfloat16 where it is quantized."""
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    tile_size: int = 32
    key_chunk_tokens: int = 64
    has_decodes: bool = True
    """False puts everything in tiles, as batch-invariant mode does."""
    num_padding_tokens: int = 3
    num_padding_seqs: int = 2

    @property
    def scale(self) -> float:
        return self.heads.head_dim**-0.5


@dataclass(frozen=True)
class Batch:
    """The arrays of a case; the op is `paged_attention(query, key, value, kv, metadata, **options)`."""

    query: Any
    key: Any
    value: Any
    kv: Any
    metadata: AttentionMetadata
    options: dict[str, Any]
    num_tokens: int
    """Real ones; the rest is padding."""


def make_batch(case: BatchCase, implementation: str, seed: int = 0) -> Batch:
    """The same batch for every implementation, poisoned: what must not be read is NaN, what must not be used is wild.

    NaN are: all blocks nobody owns, the null block, the slots past each sequence's last token (and, before the op has
    written them, those of its new tokens), and the queries, keys and values of padding tokens. Table entries past a
    sequence's last block, and those of blocks wholly before the window of its first new token, name poisoned blocks.
    """
    random = np.random.default_rng(seed)
    heads, block_size = case.heads, case.block_size
    dtype = jnp.dtype(case.input_dtype or ("bfloat16" if is_quantized(case.dtype) else case.dtype))
    contexts = [context for context, _ in case.sequences]
    lengths = [length for _, length in case.sequences]
    owned = [-(-context // block_size) for context in contexts]
    num_blocks = sum(owned) + 4
    ids = random.permutation(np.arange(1, num_blocks)).astype(np.int32)
    poisoned = ids[sum(owned) :]
    blocks_per_seq = max(owned) + 2
    tables = random.choice(poisoned, (len(owned), blocks_per_seq)).astype(np.int32)
    keys = np.full((num_blocks, block_size, heads.num_kv_heads, heads.head_dim), np.nan, np.float32)
    values = keys.copy()
    num_tokens = sum(lengths)
    padded = num_tokens + case.num_padding_tokens
    query = np.full((padded, heads.num_q_heads, heads.head_dim), np.nan, np.float32)
    query[:num_tokens] = random.standard_normal(query[:num_tokens].shape)
    new_key = np.full((padded, heads.num_kv_heads, heads.head_dim), np.nan, np.float32)
    new_value = new_key.copy()
    taken = token = 0
    for row, (context, length, count) in enumerate(zip(contexts, lengths, owned, strict=True)):
        tables[row, :count] = ids[taken : taken + count]
        taken += count
        sequence = random.standard_normal((2, context, heads.num_kv_heads, heads.head_dim), np.float32)
        # blocks that lie wholly before every window of the step have been let go, whoever has them now
        num_left = 0 if case.window is None else max(context - length - case.window + 1, 0) // block_size
        if num_left:
            tables[row, :num_left] = random.choice([0, *poisoned], num_left)
        position = np.arange(num_left * block_size, context - length)
        where = tables[row, position // block_size], position % block_size
        keys[where], values[where] = sequence[:, position]
        new_key[token : token + length], new_value[token : token + length] = sequence[:, context - length :]
        token += length
    sinks = jnp.asarray(random.standard_normal(heads.num_q_heads, np.float32)) if case.has_sinks else None
    layout = KVLayout(
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=block_size,
        dtype=case.dtype,
        implementation=implementation,
    )
    metadata = make_metadata(
        block_tables=tables,
        context_lens=contexts,
        query_lens=lengths,
        block_size=block_size,
        num_tokens=padded,
        num_seqs=len(contexts) + case.num_padding_seqs,
        tile_size=case.tile_size,
        key_chunk_tokens=case.key_chunk_tokens,
        has_decodes=case.has_decodes,
    )
    return Batch(
        query=jnp.asarray(query, dtype),
        key=jnp.asarray(new_key, dtype),
        value=jnp.asarray(new_value, dtype),
        kv=layout.pack(keys, values),
        metadata=metadata,
        options={"scale": case.scale, "window": case.window, "soft_cap": case.soft_cap, "sinks": sinks},
        num_tokens=num_tokens,
    )


def _case(name: str, heads: str, *sequences: tuple[int, int], **options: Any) -> BatchCase:
    return BatchCase(name=name, heads=HEAD_SHAPES[heads], sequences=sequences, **options)


MIXED = ((1, 1), (16, 1), (17, 1), (130, 1), (64, 64), (97, 40), (70, 3))
"""Decodes at a first token, a full block and a first slot of a block; whole prompts and chunks of some."""

CASES = (
    _case("decode: one long, the rest around the ends of blocks", "stories260k",
          *((n, 1) for n in (300, 1, 15, 16, 17, 63, 64, 65)), *((7 + i, 1) for i in range(11))),
    _case("prefill: chunks that end on and beside blocks", "stories260k", (64, 32), (65, 33), (66, 1), (128, 31)),
    _case("mixed", "smollm-135m", *MIXED),
    _case("mixed, everything in tiles", "stories260k", *MIXED, has_decodes=False, tile_size=8),
    _case("mixed, no padding, soft cap", "stories260k", *MIXED, num_padding_tokens=0, num_padding_seqs=0, soft_cap=2.0),
    _case("mixed, window that skips chunks", "stories260k", *MIXED, window=21, key_chunk_tokens=16, tile_size=8),
    _case("mixed, bfloat16 and every option", "smollm-135m", *MIXED, window=33, soft_cap=3.0, has_sinks=True,
          dtype="bfloat16"),
    _case("mixed, block of 8, window of a block", "stories260k", *MIXED, block_size=8, window=8),
    _case("mixed, block of 64, window of one token, sinks", "stories260k", *MIXED, block_size=64, window=1,
          has_sinks=True),
    _case("mixed, block larger than a decode item", "stories260k", *MIXED, block_size=256, key_chunk_tokens=256),
    _case("one head for all queries", "gemma-2b", (33, 1), (20, 20)),
    _case("a head for each query, bfloat16", "opt-125m", (33, 1), (1, 1), (20, 20), dtype="bfloat16"),
    _case("heads of 80, bfloat16", "phi-2", (18, 1), (9, 9), dtype="bfloat16"),
    _case("heads of 96", "phi-3-mini", (18, 1), (17, 2)),
    _case("decodes longer than a turn of any kernel", "stories260k", (2100, 1), (5, 1), (1025, 1), block_size=64),
    _case("decodes longer than a turn, with a window", "stories260k", (2100, 1), (1500, 1), (1025, 1), block_size=64,
          window=1100),
    _case("sinks and window of a real model", "gpt-oss-20b", (150, 1), (140, 9), window=128, has_sinks=True),
    _case("mixed, int8 and every option", "smollm-135m", *MIXED, window=33, soft_cap=3.0, has_sinks=True, dtype="int8"),
    _case("mixed, float8", "llama3-8b", *MIXED, dtype="float8_e4m3fn"),
    _case("mixed, everything in tiles, int8", "stories260k", *MIXED, has_decodes=False, tile_size=8, dtype="int8"),
    _case("heads of 80, float8, block of 32", "phi-2", (70, 1), (40, 9), block_size=32, dtype="float8_e4m3fn"),
    _case("one head for all queries, block of 64, float8", "gemma-2b", (133, 1), (20, 20), block_size=64,
          dtype="float8_e4m3fn"),
    _case("decodes longer than a turn, with a window, int8", "stories260k", (2100, 1), (1500, 1), (1025, 1),
          window=1100, dtype="int8"),
)  # fmt: skip
"""What every implementation is held against the reference on."""

BENCH: dict[str, Any] = {"tile_size": TILE_SIZE, "key_chunk_tokens": KEY_CHUNK_TOKENS, "num_padding_tokens": 0}
"""Tiles as the engine cuts them."""

BENCH_CASES = (
    _case("64 decodes at 250", "dim768", *((250, 1),) * 64, **BENCH),
    _case("8 decodes at 2000", "dim768", *((2000, 1),) * 8, **BENCH),
    _case("decodes at 2000 and 7 x 100", "dim768", (2000, 1), *((100, 1),) * 7, **BENCH),
    _case("1 decode at 250", "dim768", (250, 1), **BENCH),
    _case("prefill of 512", "dim768", (512, 512), **BENCH),
)
"""What is timed."""


def with_options(case: BatchCase, **options: Any) -> BatchCase:
    """The case with some fields changed."""
    return replace(case, **options)
