"""What follows from the configs before any weight is loaded: buckets, KV layout, lengths, and the memory plan."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.config import EngineConfig
from jaxpaged.core.table_layout import TableLayout
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.layer_groups import LayerGroups, group_layers
from jaxpaged.runner.buckets import Bucket, Buckets, make_buckets
from jaxpaged.runner.input_batch import Attending, PackedLayout, ProcessorBits, RowTables
from jaxpaged.runner.kv_cache import MemoryPlan, plan_memory
from jaxpaged.runner.logits_processors import table_bytes
from jaxpaged.runner.sampler import state_bytes
from jaxpaged.sharding import HeadCounts, cut_heads
from pallas_kernels import KVLayout, linear_misfit, target_platform
from pallas_kernels.paged_attention.tuning import ShapeClass, tuned_sizes
from pallas_kernels.self_check import self_check

FALLBACK = "xla"
"""The implementation of attention that runs wherever jax does."""
TILE_SIZE = 64
"""Query tokens in a chunk tile where no tuned size is known (measured in pallas_kernels/README.md, decision 6)."""
KEY_CHUNK_TOKENS = 128
"""Keys per turn of a chunk tile, likewise; a block of more tokens is one turn."""
CACHE_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""What vLLM's names of a cache's dtype mean."""
INVARIANT_TILE_SIZE = 8
"""The same in batch-invariant mode, where a decode pays for a whole tile."""


@dataclass(frozen=True)
class RunnerShapes:
    """Everything about shapes that follows from the configs, before any weight is loaded."""

    buckets: Buckets
    attending: Attending
    layout: KVLayout
    """Of one layer's cache on one device."""
    groups: LayerGroups
    max_model_len: int
    blocks_per_seq: int
    """Columns of a block table; each has a block for every layer group."""
    num_rows: int

    def packed_layout(self, bucket: Bucket) -> PackedLayout:
        return PackedLayout(bucket, self.blocks_per_seq, self.attending, self.groups)

    def row_tables(self, processor_bits: ProcessorBits = lambda params: 0) -> RowTables:
        return RowTables(self.num_rows, self.blocks_per_seq, len(self.groups.windows), processor_bits)


def cache_dtype(engine_config: EngineConfig, dtype: str) -> str:
    """The KV cache's dtype for a model of `dtype`."""
    asked = engine_config.kv_cache_dtype
    return dtype if asked == "auto" else CACHE_DTYPES.get(asked, asked)


def resolve_shapes(engine_config: EngineConfig, model_config: ModelConfig, dtype: str) -> RunnerShapes:
    """Buckets, KV layout and lengths for a model under these choices. Raises ValueError on contradictions."""
    max_model_len = engine_config.max_model_len or model_config.max_position_embeddings
    if max_model_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} is above the model's {model_config.max_position_embeddings} positions: "
            "lower it"
        )
    if not engine_config.enable_chunked_prefill and engine_config.max_num_batched_tokens < max_model_len:
        raise ValueError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens ({engine_config.max_num_batched_tokens}) of at "
            f"least max_model_len ({max_model_len})"
        )
    is_invariant = engine_config.batch_invariant
    is_cpu = target_platform() == "cpu"
    heads = heads_of_one_device(model_config, engine_config)
    layout = KVLayout(
        num_kv_heads=heads.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=engine_config.block_size,
        dtype=cache_dtype(engine_config, dtype),
        implementation=engine_config.attention_implementation,
    )
    return RunnerShapes(
        buckets=make_buckets(
            max_num_batched_tokens=engine_config.max_num_batched_tokens,
            max_num_seqs=engine_config.max_num_seqs,
            min_num_tokens=2 if is_cpu and dtype != "float32" else 1,
            has_middles=is_cpu,
            is_single=is_invariant,
        ),
        attending=_attending(layout, heads.num_q_heads // heads.num_kv_heads, is_invariant),
        layout=layout,
        groups=_layer_groups(engine_config, model_config, max_model_len),
        max_model_len=max_model_len,
        blocks_per_seq=-(-max_model_len // engine_config.block_size),
        num_rows=engine_config.max_num_seqs,
    )


def _layer_groups(engine_config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> LayerGroups:
    """A window that no sequence outgrows is none."""
    windows = [
        None if window is None or window >= max_model_len else window
        for window in model_config.windows or [None] * model_config.num_layers
    ]
    layout = TableLayout(engine_config.block_size)
    return group_layers(
        windows, lambda window: layout.most_columns(window, max_model_len, engine_config.max_num_batched_tokens)
    )


def heads_of_one_device(model_config: ModelConfig, engine_config: EngineConfig) -> HeadCounts:
    """The heads that each device has. Raises ValueError where they cannot be cut."""
    return cut_heads(model_config.num_q_heads, model_config.num_kv_heads, engine_config.tensor_parallel_size)


def _attending(layout: KVLayout, group: int, is_invariant: bool) -> Attending:
    """Tiles as they were tuned for the device; those of batch-invariant mode are the same everywhere."""
    tiles: Mapping[str, int] = {"tile_size": INVARIANT_TILE_SIZE}
    if not is_invariant:
        shape = ShapeClass(
            implementation=layout.row.name,
            dtype=layout.dtype,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            num_kv_heads=layout.num_kv_heads,
            group=group,
        )
        tiles = tuned_sizes(shape).tiles
    return Attending(
        tile_size=tiles.get("tile_size", TILE_SIZE),
        key_chunk_tokens=max(tiles.get("key_chunk_tokens", KEY_CHUNK_TOKENS), layout.block_size),
        has_decode_tiles=not is_invariant,
    )


def with_checked_attention(engine_config: EngineConfig, model_config: ModelConfig, dtype: str) -> EngineConfig:
    """The config, with the implementation of attention named that is to be used on this device.

    One that was picked, not asked for, is compared with the reference on one small case; where it fails, a warning
    says why and plain XLA takes its place. Implementations that run on the host's own processor are trusted: they are
    compared in every run of the tests.
    """
    if engine_config.attention_implementation is not None or target_platform() == "cpu":
        return engine_config
    row = resolve_shapes(engine_config, model_config, dtype).layout.row
    heads = heads_of_one_device(model_config, engine_config)
    reason = self_check(
        row.name,
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=engine_config.block_size,
        dtype=cache_dtype(engine_config, dtype),
    )
    if reason is None:
        return replace(engine_config, attention_implementation=row.name)
    warnings.warn(
        f"the attention kernel {row.name} failed its check on this device and is not used ({reason}): plain XLA is, "
        "which is slower; please report it",
        stacklevel=2,
    )
    return replace(engine_config, attention_implementation=FALLBACK)


def missing_kernels(layout: KVLayout) -> str | None:
    """What to install for the compiled CPU kernels, where they would be used and there is no compiler; else None."""
    if target_platform() != "cpu" or layout.implementation is not None or layout.row.name == "native_cpu":
        return None
    reason = linear_misfit("native_cpu", "float32")
    if reason is None or "is installed" not in reason:  # one that fails has warned
        return None
    return f"the compiled CPU kernel {reason}: plain XLA runs instead, slower; install one, as with `apt install g++`"


def costly_cache(layout: KVLayout) -> str | None:
    """Why a KV cache of bytes was the wrong choice: it takes as much as bfloat16, or more; else None."""
    reason = layout.why_no_saving
    return None if reason is None else f"{reason} (kv_cache_dtype='bfloat16')"


def memory_plan(
    engine_config: EngineConfig,
    model_config: ModelConfig,
    shapes: RunnerShapes,
    *,
    weight_bytes: int,
    dtype: str,
    logits_processors: Mapping[str, Callable[..., Any]] | None = None,
) -> MemoryPlan:
    """The memory plan of a model, before or after its weights are loaded; `weight_bytes` are those of one device.

    Raises ValueError as `plan_memory` does, and for arguments of logits processors that take too much memory.
    """
    state = state_bytes(shapes.num_rows, shapes.max_model_len, model_config.vocab_size)
    largest = shapes.buckets.all[-1]
    return plan_memory(
        engine_config,
        model_config,
        device=jax.devices()[0],
        weight_bytes=weight_bytes,
        layer_block_bytes=shapes.layout.block_bytes,
        groups=shapes.groups,
        sampler_bytes=state + table_bytes(logits_processors or {}, shapes.num_rows),
        itemsize=jnp.dtype(dtype).itemsize,
        max_model_len=shapes.max_model_len,
        num_tokens=largest.num_tokens,
        num_logits=largest.num_logits,
    )
