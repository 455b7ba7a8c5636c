"""Swaps of an 8B Llama's blocks through pinned memory, compiled for devices that are not here."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxpaged.runner.host_pool import PinnedPool
from pallas_kernels import KVLayout, lowering_for
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


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("platform", "kind", "compile_for"), [H200, *TPUS])
def test_swaps_compile_with_the_cache_in_place(platform, kind, compile_for):
    with lowering_for(platform, kind):
        layout = KVLayout(num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
        layer = jax.eval_shape(lambda: layout.init(num_blocks=NUM_BLOCKS))
    kv = (layer,) * NUM_LAYERS
    ids = jax.ShapeDtypeStruct((NUM_COPIES,), jnp.int32)
    staged = jax.eval_shape(PinnedPool.stage_out, kv, ids)
    assert len(jax.tree.leaves(staged)) == NUM_COPIES, "one transfer a block, as all leaves are of one kind"
    assert num_bytes(staged) * NUM_BLOCKS == num_bytes(kv) * NUM_COPIES
    leaves = jax.tree.leaves(kv)
    shape = ",".join(map(str, leaves[0].shape))

    out = compile_for(PinnedPool.stage_out, kv, ids)
    assert out.memory_analysis().temp_size_in_bytes <= 2 * num_bytes(staged)
    assert set(re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", out.as_text())) == {"parameter"}

    back = compile_for(PinnedPool.stage_in, kv, ids, staged, donate=0)
    memory = back.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(kv)
    assert memory.temp_size_in_bytes <= 2 * num_bytes(staged)
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", back.as_text())
    assert made.count("scatter") == len(leaves)
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)
