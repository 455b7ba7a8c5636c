"""The whole step of a 70B Llama, compiled for eight TPUs that are not here: cache in place, no collective too many."""

import re
from collections import Counter

import jax
import pytest
from aot_targets import NUM_BLOCKS, V6E, num_bytes

from jaxpaged.config import EngineConfig
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.shapes import resolve_shapes
from jaxpaged.runner.step import abstract_step
from jaxpaged.sharding import make_mesh
from pallas_kernels import lowering_for
from pallas_kernels.aot import compile_over_tpus, tpu_devices

NUM_DEVICES = 8
NUM_LAYERS = 80
LLAMA_70B = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128_256, model_dim=8192, mlp_dim=28_672, num_layers=NUM_LAYERS,
    num_q_heads=64, num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=5e5,
    tie_embeddings=False, dtype="bfloat16",
)  # fmt: skip
MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [64, 512], ids=["decodes", "mixed"])
def test_the_step_of_a_70b_llama_compiles_for_eight_tpus(num_tokens: int) -> None:
    V6E.skip_if_missing()
    config = EngineConfig(
        max_num_seqs=64, max_num_batched_tokens=512, block_size=16, tensor_parallel_size=NUM_DEVICES
    )
    mesh = make_mesh(NUM_DEVICES, tpu_devices("v6e:2x4"))
    with lowering_for(V6E.platform, V6E.kind):
        shapes = resolve_shapes(config, LLAMA_70B, "bfloat16")
        assert shapes.layout.row.name == "mosaic_tpu"
        assert shapes.layout.num_kv_heads == 1
        bucket = shapes.buckets.pick(num_tokens, 64, 64)
        step = abstract_step(config, LLAMA_70B, shapes, bucket, NUM_BLOCKS, mesh)
    program = compile_over_tpus(step.function, *step.arguments, donate=step.donate)
    text = program.as_text()
    memory = program.memory_analysis()

    # of one device: an eighth of every weight but the norms, and of every block
    cache_bytes = num_bytes(step.arguments[1]) // NUM_DEVICES
    assert cache_bytes == NUM_LAYERS * NUM_BLOCKS * 16 * 2 * 128 * 2
    assert memory.alias_size_in_bytes >= cache_bytes + num_bytes(step.arguments[2])
    weight_bytes = num_bytes(step.arguments[0])
    assert memory.argument_size_in_bytes < weight_bytes / NUM_DEVICES * 1.01 + memory.alias_size_in_bytes + MIB
    # the logits of all rows, gathered, are 31 MiB; the largest sums that are on their way [tokens, model_dim] 16
    assert memory.temp_size_in_bytes < 256 * MIB
    # one sum for the embedding, two a layer (attention, MLP); one gathering of logits
    collectives = Counter(
        re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    )
    assert collectives == {"all-reduce": 2 * NUM_LAYERS + 1, "all-gather": 1}
    assert text.count("tpu_custom_call") >= 2 * NUM_LAYERS, "kernels for decodes and tiles in every layer"
    cache = jax.tree.leaves(step.arguments[1])[0]
    shape = ",".join(map(str, cache.sharding.shard_shape(cache.shape)))
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", text)
    assert made.count("parameter") >= NUM_LAYERS, "the shape is that of each layer's cache"
    assert "copy" not in made
