"""Block copies of an 8B Llama's cache, compiled for devices that are not here: in place, and a few kernels a leaf."""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import KVLayout, copy_blocks, gather_blocks, lowering_for, scatter_blocks
from pallas_kernels.aot import compile_for_h200, compile_for_tpu, missing_for_h200, missing_for_tpu

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no host to be asked for its topology
NUM_LAYERS, NUM_BLOCKS, NUM_COPIES = 32, 4096, 16
H200 = pytest.param(
    "gpu", "NVIDIA H200", compile_for_h200, id="H200",
    marks=pytest.mark.skipif(missing_for_h200() is not None, reason=str(missing_for_h200())),
)  # fmt: skip
TPUS = [
    pytest.param(
        "tpu", kind, partial(compile_for_tpu, topology=topology), id=topology,
        marks=pytest.mark.skipif(missing_for_tpu() is not None, reason=str(missing_for_tpu())),
    )
    for topology, kind in (("v5e:2x2", "TPU v5 lite"), ("v6e:2x2", "TPU v6 lite"))
]  # fmt: skip


@pytest.mark.parametrize("name", ["copy", "scatter"])
@pytest.mark.parametrize(("platform", "kind", "compile_for"), [H200, *TPUS])
def test_block_copies_compile_in_place(
    platform: str, kind: str, compile_for: Callable[..., jax.stages.Compiled], name: str
) -> None:
    with lowering_for(platform, kind):
        layout = KVLayout(num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
        layer: Any = jax.eval_shape(lambda: layout.init(num_blocks=NUM_BLOCKS))
    kv = (layer,) * NUM_LAYERS
    ids = jax.ShapeDtypeStruct((NUM_COPIES,), jnp.int32)
    staged = jax.eval_shape(gather_blocks, kv, ids)
    if name == "copy":
        compiled = compile_for(copy_blocks, kv, ids, ids, donate=0)
    else:
        compiled = compile_for(scatter_blocks, kv, ids, staged, donate=0)
    leaves = jax.tree.leaves(kv)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    staged_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(staged))
    assert memory.temp_size_in_bytes <= (staged_bytes if name == "copy" else 0)
    shape = ",".join(map(str, leaves[0].shape))
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", text)
    assert made.count("scatter") == len(leaves)
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)
    # else 16-bit elements are written by compare-and-swap on a GPU
    assert len(re.findall(r" scatter\(.*unique_indices=true", text)) == len(leaves)
    launches = len(re.findall(r" = .* fusion\(", text[text.index("\nENTRY ") :]))
    assert launches <= 2 * len(leaves) + 4, "one read and one write a leaf, and the ids"
