"""Whose attention is timed on an accelerator: programs of some layers, on caches of random keys and values.

Each layer has a cache of its own and is fed by the one before, so that launches from the host hide behind one another
as they do in a model. Peers: JAX's own paged kernels, and `jax.nn.dot_product_attention` on contiguous keys and values,
by cuDNN and by XLA, which is what paging costs nothing against.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.device_cases import DeviceCase
from pallas_kernels import KVLayout, make_metadata, paged_attention
from pallas_kernels.paged_attention.api import find
from pallas_kernels.paged_attention.metadata import KEY_CHUNK_TOKENS, TILE_SIZE
from pallas_kernels.paged_attention.tuning import Sizes


def attend_with(name: str, sizes: Sizes | None) -> Callable[..., tuple[Any, Any]]:
    """The op by one implementation; `sizes` None takes what it takes by itself, else they and defaults are taken."""
    if sizes is None:
        return partial(paged_attention, implementation=name)
    module = importlib.import_module(f"pallas_kernels.paged_attention.{name}")
    launch = replace(module.default_launch(), **sizes.launch)
    return partial(find(name).attend, window=None, soft_cap=None, sinks=None, launch=launch)


def _random_leaf(shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Normal numbers, as bfloat16, as the bits of one or two of them in a word, or as bytes; scales are like them."""
    if shape.dtype == jnp.int8:
        return jax.random.randint(key, shape.shape, -127, 128, jnp.int8)
    if shape.dtype.itemsize == 1:
        numbers = jax.random.normal(key, shape.shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)
        return jax.lax.bitcast_convert_type(numbers, shape.dtype)
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.normal(key, shape.shape, shape.dtype)
    num_halves = shape.dtype.itemsize // 2
    halves = jax.random.normal(key, (*shape.shape, num_halves), jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(halves, shape.dtype)
    return bits[..., 0] if bits.ndim > len(shape.shape) else bits


@dataclass(frozen=True)
class Layers:
    """A program of some layers, and what it is called with."""

    run: Callable[..., tuple[Any, Any]]
    """(caches, query, *rest) -> (caches, output); the caches are donated."""
    caches: Any
    arguments: tuple[Any, ...]


def _stack(layer: Callable[..., tuple[Any, Any]], num_layers: int) -> Callable[..., tuple[Any, Any]]:
    """Layers on caches of their own; the output of one is the query of the next, so that none is left out."""
    layer = jax.jit(layer)  # traced and lowered once

    def run(caches: list[Any], query: jax.Array, *rest: Any) -> tuple[list[Any], jax.Array]:
        written = []
        for index in range(num_layers):
            query, cache = layer(query, caches[index], *rest)
            written.append(cache)
        return written, query

    return jax.jit(run, donate_argnums=0)


def _queries(case: DeviceCase) -> tuple[jax.Array, jax.Array]:
    """Query [tokens, q_heads, head_dim] and new keys, used as values too, [tokens, kv_heads, head_dim]."""
    heads, num_tokens = case.heads, case.batch * case.num_new
    query = jax.random.normal(jax.random.key(1), (num_tokens, heads.num_q_heads, heads.head_dim), jnp.bfloat16)
    key = jax.random.normal(jax.random.key(2), (num_tokens, heads.num_kv_heads, heads.head_dim), jnp.bfloat16)
    return query, key


def _tables(case: DeviceCase) -> tuple[np.ndarray, int]:
    """Block tables [batch, blocks], scattered over the cache, and its number of blocks; block 0 is nobody's."""
    per_sequence = -(-case.context // case.block_size)
    blocks = np.random.default_rng(0).permutation(case.batch * per_sequence) + 1
    return blocks.astype(np.int32).reshape(case.batch, per_sequence), case.batch * per_sequence + 1


def ours(name: str, case: DeviceCase, num_layers: int) -> Layers:
    """An implementation of this package."""
    run, arguments = our_program(name, case, num_layers, None)
    return Layers(run, our_caches(name, case, num_layers), arguments)


def our_caches(name: str, case: DeviceCase, num_layers: int) -> list[Any]:
    """A cache of random keys and values for each layer."""
    _, num_blocks = _tables(case)
    layout = KVLayout(
        num_kv_heads=case.heads.num_kv_heads, head_dim=case.heads.head_dim, block_size=case.block_size,
        dtype=case.dtype, implementation=name,
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(layout.shapes(num_blocks))
    fill = jax.jit(lambda key: [_random_leaf(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)])
    return [jax.tree.unflatten(tree, fill(jax.random.key(index))) for index in range(num_layers)]


def our_program(
    name: str, case: DeviceCase, num_layers: int, sizes: Sizes | None
) -> tuple[Callable[..., tuple[Any, Any]], tuple[Any, ...]]:
    """What is run on `our_caches`, and what it is called with behind them; `sizes` as in `attend_with`."""
    tables, _ = _tables(case)
    tiles = {"tile_size": TILE_SIZE, "key_chunk_tokens": max(KEY_CHUNK_TOKENS, case.block_size)}
    metadata = make_metadata(
        block_tables=tables, context_lens=[case.context] * case.batch, query_lens=[case.num_new] * case.batch,
        block_size=case.block_size, **(tiles if sizes is None else tiles | sizes.tiles),
    )  # fmt: skip
    attend = attend_with(name, sizes)

    def layer(query: jax.Array, kv: Any, key: jax.Array, metadata: Any) -> tuple[Any, Any]:
        return attend(query, key, key, kv, metadata, scale=case.heads.head_dim**-0.5)

    query, key = _queries(case)
    return _stack(layer, num_layers), (query, key, metadata)


def contiguous(implementation: str, case: DeviceCase, num_layers: int) -> Layers:
    """`jax.nn.dot_product_attention` on keys and values that lie as one array; nothing is written."""
    heads = case.heads
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN runs on GPUs")
    if case.num_new not in (1, case.context):
        raise NotImplementedError("its causal mask begins at the first key: whole prompts and decodes only")
    shape = (2, case.batch, case.context, heads.num_kv_heads, heads.head_dim)
    caches = [jax.random.normal(jax.random.key(index), shape, jnp.bfloat16) for index in range(num_layers)]

    def layer(query: jax.Array, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        attended = jax.nn.dot_product_attention(
            query.reshape(case.batch, case.num_new, *query.shape[1:]), kv[0], kv[1],
            is_causal=case.num_new > 1, implementation=implementation,
        )  # fmt: skip
        return attended.reshape(query.shape), kv

    return Layers(_stack(layer, num_layers), caches, (_queries(case)[0],))


def jax_paged(case: DeviceCase, num_layers: int) -> Layers:
    """JAX's own kernel: for GPUs one in Triton for decodes, for TPUs a ragged one; new keys are not written."""
    heads = case.heads
    tables, num_blocks = _tables(case)
    lengths = jnp.full(case.batch, case.context, jnp.int32)
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (  # noqa: PLC0415
            ragged_paged_attention,
        )

        shape: tuple[int, ...] = (num_blocks, case.block_size, 2 * heads.num_kv_heads, heads.head_dim)
        starts = jnp.arange(case.batch + 1, dtype=jnp.int32) * case.num_new
        rest = (lengths, jnp.asarray(tables), starts, jnp.array([case.batch], jnp.int32))

        def layer(query: jax.Array, kv: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            return ragged_paged_attention(query, kv, *rest, sm_scale=heads.head_dim**-0.5), kv
    else:
        if case.num_new != 1:
            raise NotImplementedError("serves decodes alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as attend  # noqa: PLC0415

        shape = (2, heads.num_kv_heads, num_blocks, case.block_size, heads.head_dim)
        rest = (jnp.asarray(tables), lengths)
        splits = next(splits for splits in (16, 8, 4, 2, 1) if tables.shape[1] % splits == 0)
        pages = next(pages for pages in (8, 4, 2, 1) if tables.shape[1] // splits % pages == 0)
        is_interpreted = jax.default_backend() == "cpu"

        def layer(query: jax.Array, kv: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            attended = attend(
                query, kv[0], kv[1], *rest, k_splits=splits, pages_per_compute_block=pages, interpret=is_interpreted
            )
            return attended, kv

    caches = [jax.random.normal(jax.random.key(index), shape, jnp.bfloat16) for index in range(num_layers)]
    return Layers(_stack(layer, num_layers), caches, (_queries(case)[0], *rest))


PEERS: dict[str, Callable[[DeviceCase, int], Layers]] = {
    "jax_paged": jax_paged,
    "contiguous_cudnn": partial(contiguous, "cudnn"),
    "contiguous_xla": partial(contiguous, "xla"),
}
"""(case, number of layers) -> what is timed; each raises where it does not serve the case."""
CONTIGUOUS = ("contiguous_cudnn", "contiguous_xla")
