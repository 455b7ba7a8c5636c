"""Swaps of an 8B Llama's blocks through pinned memory, compiled for devices that are not here."""

import re

import jax
import jax.numpy as jnp
import pytest
from aot_targets import DEVICES, NUM_BLOCKS, cache_of_8b_llama, name_of, num_bytes

from jaxpaged.runner.host_pool import PinnedPool

NUM_LAYERS, NUM_COPIES = 32, 16


@pytest.mark.parametrize("device", DEVICES, ids=name_of)
def test_swaps_compile_with_the_cache_in_place(device):
    device.skip_if_missing()
    kv = cache_of_8b_llama(device, NUM_LAYERS)
    ids = jax.ShapeDtypeStruct((NUM_COPIES,), jnp.int32)
    staged = jax.eval_shape(PinnedPool.stage_out, kv, ids)
    assert len(jax.tree.leaves(staged)) == NUM_COPIES, "one transfer a block, as all leaves are of one kind"
    assert num_bytes(staged) * NUM_BLOCKS == num_bytes(kv) * NUM_COPIES
    leaves = jax.tree.leaves(kv)
    shape = ",".join(map(str, leaves[0].shape))

    out = device.compile_for(PinnedPool.stage_out, kv, ids)
    assert out.memory_analysis().temp_size_in_bytes <= 2 * num_bytes(staged)
    assert set(re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", out.as_text())) == {"parameter"}

    back = device.compile_for(PinnedPool.stage_in, kv, ids, staged, donate=0)
    memory = back.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(kv)
    assert memory.temp_size_in_bytes <= 2 * num_bytes(staged)
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", back.as_text())
    assert made.count("scatter") == len(leaves)
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)
