"""What the CPU implementations make of the cache's memory, and `xla` of a step without tiles."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import KVLayout, paged_attention
from pallas_kernels.cases import HEAD_SHAPES, MIXED, BatchCase, make_batch


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("xla", "native_cpu") for dtype in ("float32", "bfloat16")),
        ("xla", "float8_e4m3fn"),
        ("xla", "int8"),
    ],
)
def test_a_donated_cache_is_updated_in_place(dtype: str, name: str) -> None:
    num_blocks = 997  # a number that no other axis has
    case = BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED, dtype=dtype)
    batch = make_batch(case, name)
    layout = KVLayout(num_kv_heads=4, head_dim=8, block_size=16, dtype=dtype, implementation=name)
    attend = partial(paged_attention, scale=1.0, implementation=name)

    def two_layers(kv, metadata):
        hidden = batch.query
        first, kv0 = attend(hidden, batch.key, batch.value, kv[0], metadata)
        second, kv1 = attend(first, batch.key, batch.value, kv[1], metadata)
        return second, (kv0, kv1)

    kv = (layout.init(num_blocks), layout.init(num_blocks))
    compiled = jax.jit(two_layers, donate_argnums=0).lower(kv, batch.metadata).compile()
    cache_bytes = 2 * num_blocks * layout.block_bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    # whatever has the size of a whole cache is an argument, or what updates one in place
    text = compiled.as_text()
    made = re.findall(rf"= \S*\[(?:{num_blocks}|{num_blocks * 4}),[\d,]*\]\S* ([\w-]+)\(", text)
    updates = {"scatter", "fusion"} if name == "xla" else set()
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"} | updates, set(made)
    leaves = len(jax.tree.leaves(kv))
    assert all(made.count(update) == leaves for update in updates), "keys and values (and scales) of two layers"
    if name == "native_cpu":
        assert text.count("output_to_operand_aliasing={{1}: (3, {}), {2}: (4, {})}") == 2, "written by the kernel"
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kv)]
    _, kv = compiled(kv, batch.metadata)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kv)] == before


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_step_without_tiles_runs_no_loop_for_them(num_tokens: int) -> None:
    case = BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=((40, 1),) * num_tokens, num_padding_tokens=0)
    batch = make_batch(case, "xla")
    # one tile slot: the case in which XLA finds that the loop over keys does not depend on the tile
    slot = jnp.zeros(1, jnp.int32)
    metadata = dataclasses.replace(batch.metadata, tile_sequences=slot, tile_starts=slot, tile_lens=slot)
    assert int(metadata.num_tiles) == 0
    attend = jax.jit(partial(paged_attention, scale=1.0, implementation="xla"))
    text = attend.lower(batch.query, batch.key, batch.value, batch.kv, metadata).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count(" while(") == 1, "the loop over decodes alone"
    assert entry.count(" conditional(") == 1
