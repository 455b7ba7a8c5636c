"""The whole step of an 8B Llama, compiled for a TPU or an H200 that is not here: its cache in place, little else."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from aot_targets import H200, NUM_BLOCKS, V5E, V6E, Device, made_like, name_of, num_bytes

from jaxpaged.config import EngineConfig
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.shapes import resolve_shapes
from jaxpaged.runner.step import AbstractStep, abstract_step
from pallas_kernels import lowering_for

MIB = 2**20


@dataclass(frozen=True)
class Expectation:
    """What a step is made of on a device, and how much memory beside its arguments it may take."""

    kernel: str
    max_temp_bytes: dict[int, int]
    """By tokens of the step; logits go out, so queries, outputs and partial outputs are the largest."""
    tuple_bytes: int
    """More for each tuple of buffers in the program, which asynchronous copies and fusions of several results have.

    On TPU a tuple's few pointers take 16 KiB to themselves, which are counted twice."""


ON_TPU = Expectation("mosaic_tpu", {64: MIB, 512: 3 * MIB}, 2 * 16 * 2**10)
EXPECTED = {"v5e": ON_TPU, "v6e": ON_TPU, "H200": Expectation("mosaic_gpu", {64: 16 * MIB, 512: 64 * MIB}, 0)}
"""By name of the device."""


def llama_8b(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128_256, model_dim=4096, mlp_dim=14_336, num_layers=num_layers,
        num_q_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=5e5,
        tie_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def compiled_step(
    device: Device, num_layers: int, num_tokens: int, **options: Any
) -> tuple[AbstractStep, jax.stages.Compiled]:
    device.skip_if_missing()
    engine_config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, block_size=16)
    model_config = llama_8b(num_layers)
    with lowering_for(device.platform, device.kind):
        shapes = resolve_shapes(engine_config, model_config, "bfloat16")
        assert shapes.layout.row.name == EXPECTED[device.name].kernel
        bucket = shapes.buckets.pick(num_tokens, 64, 64)
        step = abstract_step(engine_config, model_config, shapes, bucket, NUM_BLOCKS)
        return step, device.compile_for(step.function, *step.arguments, donate=step.donate, **options)


@pytest.mark.parametrize(
    ("device", "num_layers"),
    [
        *((device, 4) for device in (V5E, V6E, H200)),
        *(pytest.param(device, 32, marks=pytest.mark.slow) for device in (V6E, H200)),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("num_tokens", [64, 512], ids=["decodes", "mixed"])
def test_the_step_of_an_8b_llama_compiles_with_its_cache_in_place(device, num_layers, num_tokens):
    step, program = compiled_step(device, num_layers, num_tokens)
    donated = [step.arguments[position] for position in step.donate]
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes(donated)
    expected, text = EXPECTED[device.name], program.as_text()
    # by number of layers, what XLA:TPU fetches ahead of them; arrays are in turn in the same memory
    num_tuples = sum(map(len, re.findall(r" = (\(+)", text[text.index("\nENTRY") :])))
    assert memory.temp_size_in_bytes <= expected.max_temp_bytes[num_tokens] + num_tuples * expected.tuple_bytes
    caches = jax.tree.leaves(step.arguments[1])
    if device.platform == "tpu":
        made, write, others = made_like(caches[0], text), "custom-call", {"parameter", "bitcast", "get-tuple-element"}
        assert len(caches) == num_layers
    else:
        shape = ",".join(map(str, caches[0].shape))
        made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", text)
        write, others = "scatter", {"parameter", "fusion", "get-tuple-element", "bitcast"}
        assert len(caches) == 2 * num_layers
    assert made.count(write) == len(caches)
    assert set(made) <= {write} | others, set(made)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels of Pallas join command buffers from jax 0.11 on")
@pytest.mark.parametrize("num_tokens", [64, 512], ids=["decodes", "mixed"])
def test_the_step_compiles_for_an_H200_as_one_command_buffer(num_tokens: int, tmp_path: Path) -> None:
    """The host launches one CUDA graph for a step, not some hundred kernels."""
    compiled_step(H200, 4, num_tokens, compiler_options={"xla_dump_to": str(tmp_path)})
    (launches,) = tmp_path.glob("*jit_function.thunk_sequence_after_thunk_passes.txt")
    lines = launches.read_text().splitlines()
    assert len(lines) > 80, "the kernels of four layers"
    outermost = [line for line in lines if not line.startswith(" ")]
    assert len(outermost) == 1, outermost
    assert "kCommandBuffer" in outermost[0]
