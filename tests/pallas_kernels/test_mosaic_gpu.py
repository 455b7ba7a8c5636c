"""What the Hopper kernels promise beyond being right: even work, and programs for an H200 that need none to compile."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, check_equals_the_reference, gpu_interpreter

from pallas_kernels import KVLayout, lowering_for, make_metadata, paged_attention
from pallas_kernels.aot import compile_for_h200, missing_for_h200
from pallas_kernels.cases import HEAD_SHAPES, BatchCase
from pallas_kernels.paged_attention import mosaic_gpu_layout
from pallas_kernels.paged_attention.quantization import LARGEST, quantize

TARGET = next(target for target in TARGETS if target.name == "mosaic_gpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        # tiles of two token blocks, of which the second starts behind the end of the short ones
        BatchCase(name="tiles of 96", heads=HEAD_SHAPES["stories260k"], sequences=((150, 100), (70, 20), (140, 96)),
                  tile_size=96, num_padding_tokens=0),
        # three query heads are an odd number of row blocks for two warpgroups
        BatchCase(name="odd group", heads=HEAD_SHAPES["smollm-135m"], sequences=((5, 1), (300, 130)), tile_size=64),
        BatchCase(name="many blocks a chunk", heads=HEAD_SHAPES["phi-3-mini"], sequences=((260, 1), (40, 9)),
                  block_size=8),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shapes_of_its_own_equal_the_reference(case: BatchCase, dtype: str) -> None:
    check_equals_the_reference(replace(case, dtype=dtype), TARGET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"decode_chunk_tokens": 128, "programs_per_multiprocessor": 1}, {"max_decode_stages": 2}],
    ids=["chunks of 128", "two stages"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_sizes_that_may_be_tuned_leave_decodes_as_they_are(sizes: dict[str, int], dtype: str) -> None:
    case = BatchCase(
        name="", heads=HEAD_SHAPES["stories260k"], sequences=((700, 1), (1, 1), (129, 1)), dtype=dtype,
        window=500, has_sinks=True,
    )  # fmt: skip
    check_equals_the_reference(case, replace(TARGET, running=partial(gpu_interpreter, **sizes)))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tokens_of_the_null_block_write_nothing_and_all_others_their_slot(dtype: str) -> None:
    # padding shares slot 0, and a warm-up writes to any slot of the null block, many times to each
    random = np.random.default_rng(0)
    shapes = mosaic_gpu_layout.cache_shapes(5, 8, 2, 32, jnp.dtype(dtype))
    slots = np.array([0, 17, 3, 3, 0, 39, 7, 16, 0], np.int32)
    before = [jnp.asarray(9 * random.standard_normal(leaf.shape), leaf.dtype) for leaf in shapes]
    new = [jnp.asarray(random.standard_normal((len(slots), 2, 32)), jnp.bfloat16) for _ in range(2)]
    after = jax.jit(mosaic_gpu_layout.write)(tuple(before), *new, slots)
    if dtype == "int8":
        new = [leaf for leaves in zip(*(quantize(heads, dtype, jnp) for heads in new), strict=True) for leaf in leaves]
    for old, tokens, cache in zip(before, new, after, strict=True):
        expected = np.array(old)
        for token in (1, 5, 7):
            expected[slots[token] // 8, :, slots[token] % 8] = tokens[token]
        np.testing.assert_array_equal(np.asarray(cache), expected)


# AHEAD OF TIME: the real compiler, for an H200 that is not here

compiled = pytest.mark.skipif(missing_for_h200() is not None, reason=str(missing_for_h200()))
IS_OLD = jax.__version_info__ < (0, 11)
"""As jax 0.10.2 compiles it, the tile kernel spills a few bytes for some shapes."""
CACHE_BYTES = 256 * 2**20
"""Of a layer."""


def shapes(layout: KVLayout, num_q_heads: int, *, num_tokens: int, num_seqs: int) -> tuple[Any, ...]:
    """Shapes of query, key, value, layer cache and metadata of a step."""
    metadata = make_metadata(
        block_tables=np.zeros((0, 8192 // layout.block_size), np.int32),
        context_lens=[],
        query_lens=[],
        block_size=layout.block_size,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        key_chunk_tokens=max(128, layout.block_size),
    )
    query, key = (
        jax.ShapeDtypeStruct((num_tokens, count, layout.head_dim), jnp.bfloat16)
        for count in (num_q_heads, layout.num_kv_heads)
    )
    cache = layout.shapes(CACHE_BYTES // layout.block_bytes)
    return query, key, key, cache, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), metadata)


def check_is_in_place(program: jax.stages.Compiled, layout: KVLayout, *, num_layers: int, temp_bytes: int) -> None:
    """All caches are aliased, little else is allocated, and nothing of a cache's shape is made but by the writes."""
    num_blocks = CACHE_BYTES // layout.block_bytes
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == num_layers * num_blocks * layout.block_bytes
    assert memory.temp_size_in_bytes <= temp_bytes
    for leaf in layout.shapes(num_blocks):
        shape = ",".join(map(str, leaf.shape))
        made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", program.as_text())
        assert "parameter" in made, "the pattern finds caches"
        assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)


@compiled
@pytest.mark.skipif(not IS_OLD, reason="jax 0.12 keeps to itself what PTX it makes without a device")
@pytest.mark.parametrize("dtype", ["bfloat16", *LARGEST])
def test_new_keys_and_values_are_written_by_plain_stores(dtype: str, tmp_path: Path) -> None:
    """Small elements of indices that may repeat would be written by compare-and-swap, each in a loop of its own."""
    cache = mosaic_gpu_layout.cache_shapes(4096, 16, 8, 128, jnp.dtype(dtype))
    heads, slots = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.int32)
    program = compile_for_h200(
        mosaic_gpu_layout.write, cache, heads, heads, slots, donate=0, compiler_options={"xla_dump_to": str(tmp_path)}
    )
    assert len(re.findall(r" scatter\(.*unique_indices=true", program.as_text())) == len(cache)
    text = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert "st.global" in text, "the pattern finds the kernels"
    assert not re.findall(r"\b(?:atom|red)\.\S+", text)


LLAMA_3_8B = (32, 8, 128)


@compiled
@pytest.mark.parametrize(
    ("heads", "block_size", "dtype", "options", "most_spilled"),
    [
        (LLAMA_3_8B, 16, "bfloat16", {}, 0),
        ((9, 3, 64), 64, "bfloat16", {"window": 128, "soft_cap": 30.0}, 0),
        (LLAMA_3_8B, 16, "int8", {}, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                # the ids of 16 blocks are too many for the 40 registers of the warpgroup that copies
                (LLAMA_3_8B, 8, "bfloat16", {}, 40),
                (LLAMA_3_8B, 128, "bfloat16", {"window": 4096}, 4 if IS_OLD else 0),
                (LLAMA_3_8B, 32, "bfloat16", {"soft_cap": 30.0}, 0),
                ((64, 8, 64), 16, "bfloat16", {"window": 128}, 0),
                ((32, 32, 96), 16, "bfloat16", {}, 0),
                ((32, 32, 80), 16, "bfloat16", {}, 0),
                ((12, 12, 64), 256, "bfloat16", {}, 0),
                ((71, 1, 64), 16, "bfloat16", {}, None),
                # its tile kernel has just not enough registers for everything
                ((8, 1, 256), 16, "bfloat16", {}, 0),
                ((8, 1, 256), 16, "bfloat16", {"soft_cap": 30.0, "window": 1024}, 8),
                ((8, 1, 256), 64, "bfloat16", {"window": 1024}, 8),
                (LLAMA_3_8B, 16, "float8_e4m3fn", {"soft_cap": 30.0, "window": 4096}, 0),
                (LLAMA_3_8B, 8, "float8_e4m3fn", {}, 0),
                (LLAMA_3_8B, 128, "int8", {"window": 4096}, 0),
                ((64, 8, 64), 64, "float8_e4m3fn", {"window": 128, "sinks": jnp.zeros(64)}, 0),
                ((9, 3, 64), 32, "int8", {"soft_cap": 30.0}, 0),
                ((32, 32, 96), 16, "int8", {}, 0),
                ((32, 32, 80), 16, "float8_e4m3fn", {}, 0),
                ((12, 12, 64), 256, "int8", {}, 0),
                # and of bytes it has scales in them too
                ((8, 1, 256), 16, "int8", {}, 256),
                ((8, 1, 256), 64, "float8_e4m3fn", {"soft_cap": 30.0, "window": 1024}, 256),
            )
        ),
    ],
)
def test_compiles_for_an_h200_in_place_and_keeps_to_registers(
    heads: tuple[int, int, int],
    block_size: int,
    dtype: str,
    options: dict[str, Any],
    most_spilled: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    num_q_heads, num_kv_heads, head_dim = heads
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    with lowering_for("cuda", "NVIDIA H200"):
        layout = KVLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
        step = shapes(layout, num_q_heads, num_tokens=64, num_seqs=32)
        attend = partial(paged_attention, scale=head_dim**-0.5, **options)
        if most_spilled is None:
            assert layout.row.name == "mosaic_gpu"
            with pytest.raises(ValueError, match="at most 64 query heads"):
                compile_for_h200(partial(attend, implementation="mosaic_gpu"), *step, donate=3)
            return
        program = compile_for_h200(attend, *step, donate=3)
        # outputs of items (twice, in float32), of decodes and of tiles
        check_is_in_place(program, layout, num_layers=1, temp_bytes=32 * 2**20)
    told = "".join(capfd.readouterr())
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads\n", told)]
    assert spilled, "kernels that were compiled before in this process are not told of again, but not all were"
    assert max(spilled) <= most_spilled


@compiled
def test_a_loop_of_steps_over_layers_keeps_every_cache_in_place() -> None:
    num_layers, model_dim, num_heads, num_kv_heads, head_dim = 3, 128, 32, 8, 128
    with lowering_for("cuda", "NVIDIA H200"):
        layout = KVLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=16, dtype="bfloat16")
        *_, cache, metadata = shapes(layout, num_heads, num_tokens=32, num_seqs=32)

        def steps(caches: Any, hidden: Any, weights: Any, metadata: Any) -> Any:
            def step(_: Any, carry: Any) -> Any:
                caches, hidden = list(carry[0]), carry[1]
                for layer in range(num_layers):
                    heads = (hidden @ weights[layer]).reshape(32, -1, head_dim)
                    query, key, value = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
                    output, caches[layer] = paged_attention(query, key, value, caches[layer], metadata, scale=0.1)
                    hidden = output.reshape(32, -1)[:, :model_dim]
                return caches, hidden

            return jax.lax.fori_loop(0, 4, step, (caches, hidden))

        hidden = jax.ShapeDtypeStruct((32, model_dim), jnp.bfloat16)
        weight = jax.ShapeDtypeStruct((model_dim, (num_heads + 2 * num_kv_heads) * head_dim), jnp.bfloat16)
        program = compile_for_h200(steps, [cache] * num_layers, hidden, [weight] * num_layers, metadata, donate=0)
        check_is_in_place(program, layout, num_layers=num_layers, temp_bytes=64 * 2**20)
