"""The whole step of an 8B Llama, compiled for TPUs that are not here: the cache in place, little else allocated."""

import os
import re

import jax
import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.shapes import resolve_shapes
from jaxpaged.runner.step import abstract_step
from pallas_kernels import lowering_for
from pallas_kernels.aot import TPU_TOPOLOGIES, compile_for_tpu, missing_for_tpu

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no host to be asked for its topology
DEVICE_KINDS = {"v5e:2x2": "TPU v5 lite", "v6e:2x2": "TPU v6 lite"}
NUM_BLOCKS = 4096


def llama_8b(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128_256, model_dim=4096, mlp_dim=14_336, num_layers=num_layers,
        num_q_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=5e5,
        tie_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.skipif(missing_for_tpu() is not None, reason=str(missing_for_tpu()))
@pytest.mark.parametrize(
    ("topology", "num_layers"),
    [*((topology, 4) for topology in TPU_TOPOLOGIES), pytest.param("v6e:2x2", 32, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("num_tokens", [64, 512], ids=["decodes", "mixed"])
def test_the_step_of_an_8b_llama_compiles_for_a_tpu_with_its_cache_in_place(topology, num_layers, num_tokens):
    engine_config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, block_size=16)
    with lowering_for("tpu", DEVICE_KINDS[topology]):
        shapes = resolve_shapes(engine_config, llama_8b(num_layers), "bfloat16")
        assert shapes.layout.row.name == "mosaic_tpu"
        step = abstract_step(
            engine_config, llama_8b(num_layers), shapes, shapes.buckets.pick(num_tokens, 64, 64), NUM_BLOCKS
        )
        program = compile_for_tpu(step.function, *step.arguments, topology=topology, donate=step.donate)
    donated = [step.arguments[position] for position in step.donate]
    donated_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= donated_bytes
    assert memory.temp_size_in_bytes <= 16 * 2**20, "logits go out; queries and outputs of tiles are the largest"
    caches = jax.tree.leaves(step.arguments[1])
    assert len(caches) == num_layers
    shape = ",".join(map(str, caches[0].shape))
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", program.as_text())
    assert made.count("scatter") == num_layers
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)
