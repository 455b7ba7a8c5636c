"""Block copies of an 8B Llama's cache, compiled for devices that are not here: in place, and a few kernels a leaf."""

import re

import jax
import jax.numpy as jnp
import pytest
from aot_targets import DEVICES, Device, cache_of_8b_llama, name_of, num_bytes

from pallas_kernels import copy_blocks, gather_blocks, scatter_blocks

NUM_LAYERS, NUM_COPIES = 32, 16


@pytest.mark.parametrize("name", ["copy", "scatter"])
@pytest.mark.parametrize("device", DEVICES, ids=name_of)
def test_block_copies_compile_in_place(device: Device, name: str) -> None:
    device.skip_if_missing()
    kv = cache_of_8b_llama(device, NUM_LAYERS)
    ids = jax.ShapeDtypeStruct((NUM_COPIES,), jnp.int32)
    staged = jax.eval_shape(gather_blocks, kv, ids)
    if name == "copy":
        compiled = device.compile_for(copy_blocks, kv, ids, ids, donate=0)
    else:
        compiled = device.compile_for(scatter_blocks, kv, ids, staged, donate=0)
    leaves = jax.tree.leaves(kv)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes == num_bytes(kv)
    assert memory.temp_size_in_bytes <= (num_bytes(staged) if name == "copy" else 0)
    shape = ",".join(map(str, leaves[0].shape))
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", text)
    assert made.count("scatter") == len(leaves)
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)
    # else 16-bit elements are written by compare-and-swap on a GPU
    assert len(re.findall(r" scatter\(.*unique_indices=true", text)) == len(leaves)
    launches = len(re.findall(r" = .* fusion\(", text[text.index("\nENTRY ") :]))
    assert launches <= 2 * len(leaves) + 4, "one read and one write a leaf, and the ids"
