"""Paged attention in C++ for CPUs, called by XLA through its foreign function interface (jax.ffi).

`native_cpu.cc` is compiled at first use (native_library.py). Without a C++ compiler the row says so and does not fit:
XLA serves then. The cache is stored as `xla` stores it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from pallas_kernels.native_library import NativeLibrary
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.metadata import AttentionMetadata

SYMBOLS = {jnp.dtype(jnp.float32): "paged_attention_float32", jnp.dtype(jnp.uint16): "paged_attention_bfloat16"}
"""The handler for each stored dtype of the cache."""
LIBRARY = NativeLibrary(Path(__file__).with_suffix(".cc"), tuple(SYMBOLS.values()))

cache_shapes = xla.cache_shapes
pack = xla.pack
unpack = xla.unpack


def attend(
    query: Float[Array, "tokens q_heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    kv: xla.PlainCache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], xla.PlainCache]:
    """The op as `api.paged_attention` defines it."""
    if (reason := LIBRARY.why_unavailable()) is not None:
        raise ValueError(f"native_cpu {reason}: use implementation='xla'")
    inputs = query.astype(jnp.float32) * scale
    keys, values = kv
    call = jax.ffi.ffi_call(
        LIBRARY.target(SYMBOLS[keys.dtype]),
        # shapes that know over what axes of a mesh they differ, in a shard_map
        jax.eval_shape(lambda *arrays: arrays, inputs, keys, values),
        input_output_aliases={3: 1, 4: 2},
    )
    output, keys, values = call(
        inputs,
        xla.encode(key, keys.dtype),
        xla.encode(value, values.dtype),
        keys,
        values,
        metadata.slot_mapping,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_starts,
        metadata.num_decodes,
        metadata.tile_sequences,
        metadata.tile_starts,
        metadata.tile_lens,
        metadata.num_tiles,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        window=np.int64(window or 0),
        soft_cap=np.float32(soft_cap or 0.0),
    )
    return output.astype(query.dtype), (keys, values)
