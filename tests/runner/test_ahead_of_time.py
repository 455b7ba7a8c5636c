"""The whole step of an 8B Llama, compiled for a TPU or an H200 that is not here: its cache in place, little else."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.models.config import ModelConfig
from jaxpaged.runner.shapes import resolve_shapes
from jaxpaged.runner.step import AbstractStep, abstract_step
from pallas_kernels import lowering_for
from pallas_kernels.aot import compile_for_h200, compile_for_tpu, missing_for_h200, missing_for_tpu

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no host to be asked for its topology
NUM_BLOCKS = 4096
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A device that is compiled for."""

    name: str
    platform: str
    kind: str
    kernel: str
    compile: Callable[..., jax.stages.Compiled]
    missing: str | None
    max_temp_bytes: dict[int, int]
    """By tokens of the step, 4 layers; logits go out, so queries, outputs and partial outputs are the largest."""
    temp_bytes_per_layer: int
    """More for each layer beyond 4: measured, not understood."""


def tpu(name: str, kind: str) -> Device:
    compile_ = partial(compile_for_tpu, topology=f"{name}:2x2")
    most = {64: 16 * MIB, 512: 16 * MIB}
    return Device(name, "tpu", kind, "mosaic_tpu", compile_, missing_for_tpu(), most, 3 * MIB // 2)


V5E, V6E = tpu("v5e", "TPU v5 lite"), tpu("v6e", "TPU v6 lite")
H200 = Device(
    "H200", "gpu", "NVIDIA H200", "mosaic_gpu", compile_for_h200, missing_for_h200(), {64: 16 * MIB, 512: 64 * MIB}, 0
)


def llama_8b(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128_256, model_dim=4096, mlp_dim=14_336, num_layers=num_layers,
        num_q_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, rope_theta=5e5,
        tie_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def compiled_step(
    device: Device, num_layers: int, num_tokens: int, **options: Any
) -> tuple[AbstractStep, jax.stages.Compiled]:
    if device.missing is not None:
        pytest.skip(device.missing)
    engine_config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, block_size=16)
    model_config = llama_8b(num_layers)
    with lowering_for(device.platform, device.kind):
        shapes = resolve_shapes(engine_config, model_config, "bfloat16")
        assert shapes.layout.row.name == device.kernel
        bucket = shapes.buckets.pick(num_tokens, 64, 64)
        step = abstract_step(engine_config, model_config, shapes, bucket, NUM_BLOCKS)
        return step, device.compile(step.function, *step.arguments, donate=step.donate, **options)


@pytest.mark.parametrize(
    ("device", "num_layers"),
    [
        *((device, 4) for device in (V5E, V6E, H200)),
        *(pytest.param(device, 32, marks=pytest.mark.slow) for device in (V6E, H200)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("num_tokens", [64, 512], ids=["decodes", "mixed"])
def test_the_step_of_an_8b_llama_compiles_with_its_cache_in_place(device, num_layers, num_tokens):
    step, program = compiled_step(device, num_layers, num_tokens)
    donated = [step.arguments[position] for position in step.donate]
    donated_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= donated_bytes
    more_layers = (num_layers - 4) * device.temp_bytes_per_layer
    assert memory.temp_size_in_bytes <= device.max_temp_bytes[num_tokens] + more_layers
    caches = jax.tree.leaves(step.arguments[1])
    assert len(caches) == num_layers * (1 if device.platform == "tpu" else 2)
    shape = ",".join(map(str, caches[0].shape))
    made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", program.as_text())
    assert made.count("scatter") == len(caches)
    assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)


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
