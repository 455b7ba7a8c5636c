"""What the TPU kernel promises beyond being right: no races in either order of copies, rows that do not depend on
company, memory limits that are told, and a program for real TPUs that updates its cache in place."""

import os
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_targets import made_like
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernel_targets import TARGETS, Target, check_equals_the_reference, tpu_interpreter

from pallas_kernels import AttentionMetadata, KVLayout, lowering_for, make_metadata, paged_attention
from pallas_kernels.aot import TPU_TOPOLOGIES, compile_for_tpu, missing_for_tpu
from pallas_kernels.cases import CASES, BatchCase
from pallas_kernels.paged_attention.quantization import is_quantized

(TARGET,) = (target for target in TARGETS if target.name == "mosaic_tpu")
interpreted = pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU is here: nothing is interpreted")


@interpreted
def test_the_interpreter_finds_a_race() -> None:
    def kernel(source: Any, target: Any, scratch: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(source, scratch, arrived)
        copy.start()
        target[...] = scratch[...]  # before the copy was waited for
        copy.wait()

    def racing(source: Any) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(source)

    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"), tpu_interpreter("eager"):
        jax.block_until_ready(jax.jit(racing)(jnp.ones((8, 128))))


EAGER = ("mixed, window that skips chunks", "mixed, bfloat16 and every option")


@interpreted
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in EAGER else pytest.mark.slow) for case in CASES],
)
def test_equals_the_reference_when_copies_happen_at_once(case: BatchCase) -> None:
    eager = Target("mosaic_tpu", partial(tpu_interpreter, "eager"), TARGET.block_multiple)
    check_equals_the_reference(case, eager)


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("bfloat16", 19), ("int8", None)])
def test_a_token_in_tiles_is_bit_equal_in_any_row_company_chunking_and_block_size(
    dtype: str, window: int | None
) -> None:
    num_tokens, num_seqs, length = 48, 3, 40
    random = np.random.default_rng(0)
    stories = [random.standard_normal((num_seqs, length, heads, 64), np.float32) for heads in (4, 2, 2)]

    def tell(block_size: int, steps: list[list[tuple[int, int]]]) -> np.ndarray:
        """Outputs of sequence 0; each step lists (sequence, new tokens) in the order of the batch."""
        per_seq = 64 // block_size
        tables = 1 + np.random.default_rng(1).permutation(num_seqs * per_seq).reshape(num_seqs, per_seq)
        attend = jax.jit(partial(paged_attention, scale=0.125, window=window, implementation=TARGET.name))
        kv = KVLayout(num_kv_heads=2, head_dim=64, block_size=block_size, dtype=dtype, implementation=TARGET.name)
        cache, done, told = kv.init(1 + num_seqs * per_seq), [0] * num_seqs, []
        for step in steps:
            new = [(row, done[row], done[row] + count) for row, count in step]
            metadata = make_metadata(
                block_tables=tables[[row for row, _ in step]].astype(np.int32),
                context_lens=[end for _, _, end in new],
                query_lens=[count for _, count in step],
                block_size=block_size,
                num_tokens=num_tokens,
                num_seqs=num_seqs,
                tile_size=8,
                key_chunk_tokens=32,
                has_decodes=False,
            )
            arrays = []
            for story in stories:
                joined = np.concatenate([story[row, first:end] for row, first, end in new])
                padded = np.full((num_tokens, *joined.shape[1:]), np.nan, np.float32)
                padded[: len(joined)] = joined
                arrays.append(jnp.asarray(padded, jnp.dtype("bfloat16" if is_quantized(dtype) else dtype)))
            output, cache = attend(*arrays, cache, metadata)
            output = np.asarray(output.astype(jnp.float32))
            begin = 0
            for row, first, end in new:
                if row == 0:
                    told.append(output[begin : begin + end - first])
                begin += end - first
                done[row] = end
        return np.concatenate(told)

    with TARGET.running():
        alone = tell(16, [[(0, length)]])
        assert alone.shape[0] == length
        assert np.isfinite(alone).all()
        chunked = tell(8, [[(0, 13)], [(0, 1)], [(0, 26)]])
        company = tell(32, [[(2, 5), (0, 11), (1, 30)], [(1, 3), (0, 29)]])
    np.testing.assert_array_equal(chunked, alone)
    np.testing.assert_array_equal(company, alone)


def shapes(
    layout: KVLayout, num_q_heads: int, *, num_blocks: int, num_tokens: int = 64, num_seqs: int = 32,
    blocks_per_seq: int = 64, tile_size: int = 64, dtype: str | None = None,
) -> tuple[Any, Any, Any, Any, AttentionMetadata]:  # fmt: skip
    """Query, key, value, cache and metadata of a step, without their memory."""

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    num_tiles = num_tokens // tile_size + num_seqs
    metadata = AttentionMetadata(
        block_tables=array(num_seqs, blocks_per_seq),
        context_lens=array(num_seqs),
        query_starts=array(num_seqs + 1),
        slot_mapping=array(num_tokens),
        num_decodes=array(),
        tile_sequences=array(num_tiles),
        tile_starts=array(num_tiles),
        tile_lens=array(num_tiles),
        num_tiles=array(),
        tile_size=tile_size,
        key_chunk_tokens=max(128, layout.block_size),
    )
    query = array(num_tokens, num_q_heads, layout.head_dim, dtype=dtype or layout.dtype)
    key = array(num_tokens, layout.num_kv_heads, layout.head_dim, dtype=dtype or layout.dtype)
    return query, key, key, layout.shapes(num_blocks), metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seqs": 256, "blocks_per_seq": 1024}, "256 sequences with 1024 blocks of 16 .* take 1052688 .* larger"),
        ({"tile_size": 1024}, "tiles of 1024 tokens with 32 query heads.* lower tile_size"),
        ({"num_tokens": 131072}, "slots of 131072 tokens take 1048576 .* fewer tokens a step"),
    ],
)
def test_what_does_not_fit_in_a_core_is_refused_with_the_remedy(change: dict[str, int], message: str) -> None:
    with lowering_for("tpu", "TPU v5 lite"):
        layout = KVLayout(num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16", implementation="mosaic_tpu")
        step = shapes(layout, 32, num_blocks=4, **change)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(partial(paged_attention, scale=1.0), *step)


# AHEAD OF TIME: the real compiler, for a TPU that is not here

# there is no TPU host to be asked what it is
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-4", "TPU_WORKER_HOSTNAMES": "localhost"}
compiled = pytest.mark.skipif(missing_for_tpu() is not None, reason=str(missing_for_tpu()))
CACHE_BYTES = 256 * 2**20
"""Of a layer. More than vector memory has, so that a copy of it would have to be in HBM."""


def check_is_in_place(program: jax.stages.Compiled, layout: KVLayout, *, num_layers: int, temp_bytes: int) -> None:
    """All caches are aliased, little else is allocated, and nothing of a cache's shape is made but by the writes."""
    num_blocks = CACHE_BYTES // layout.block_bytes
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == num_layers * num_blocks * layout.block_bytes
    assert memory.temp_size_in_bytes <= temp_bytes
    (cache,) = jax.tree.leaves(layout.shapes(num_blocks))
    made = made_like(cache, program.as_text())
    assert made.count("custom-call") == num_layers, "new keys and values of each layer are written"
    assert set(made) <= {"parameter", "custom-call", "get-tuple-element", "bitcast"}, set(made)
    for kernel in ("write", "decodes", "tiles"):
        calls = re.findall(rf"%paged_attention_{kernel}\S* = .* custom-call\(", program.as_text())
        assert len(calls) == num_layers, kernel


@compiled
@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (32, 8, 128, 16, "bfloat16"),
        (9, 3, 64, 16, "bfloat16"),
        (8, 1, 256, 32, "bfloat16"),
        (12, 12, 64, 128, "float32"),
        (32, 8, 128, 16, "int8"),
        (9, 3, 64, 16, "float8_e4m3fn"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (32, 8, 128, 16, "float8_e4m3fn"), (8, 1, 128, 8, "int8"), (8, 1, 256, 32, "float8_e4m3fn"),
                (32, 32, 80, 64, "int8"), (64, 8, 64, 32, "int8"),
            )
        ),
        *(
            pytest.param(*case, "bfloat16", marks=pytest.mark.slow)
            for case in (
                (8, 1, 128, 16), (8, 1, 64, 16), (8, 2, 128, 16), (32, 4, 64, 16), (12, 12, 64, 16), (12, 12, 128, 16),
                (32, 32, 96, 16), (32, 32, 80, 16), (64, 8, 64, 16), (32, 8, 128, 8), (32, 8, 128, 32),
                (32, 8, 128, 64), (32, 8, 128, 128), (9, 3, 64, 8), (9, 3, 64, 64),
            )
        ),
    ],
)  # fmt: skip
def test_compiles_for_a_tpu_and_writes_in_place(
    num_q_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str, topology: str
) -> None:
    with lowering_for("tpu", "TPU v5 lite"):
        layout = KVLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
        assert layout.row.name == "mosaic_tpu"
        dtype = "bfloat16" if is_quantized(dtype) else dtype
        step = shapes(layout, num_q_heads, num_blocks=CACHE_BYTES // layout.block_bytes, dtype=dtype)
        attend = partial(paged_attention, scale=head_dim**-0.5)
        program = compile_for_tpu(attend, *step, topology=topology, donate=3)
        # queries and outputs of tiles, for 64 tokens and a tile: 4 MiB each at most in these shapes
        check_is_in_place(program, layout, num_layers=1, temp_bytes=8 * 2**20)


@compiled
@pytest.mark.parametrize("topology", TPU_TOPOLOGIES)
def test_every_option_and_small_caches_compile_for_a_tpu(topology: str) -> None:
    with lowering_for("tpu", "TPU v5 lite"):
        layout = KVLayout(num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16")
        step = shapes(layout, 64, num_blocks=256, num_tokens=8, num_seqs=8, tile_size=32)

        def attend(query: Any, key: Any, value: Any, kv: Any, metadata: AttentionMetadata, sinks: Any) -> Any:
            return paged_attention(
                query, key, value, kv, metadata, scale=0.125, window=128, soft_cap=30.0, sinks=sinks
            )

        sinks = jax.ShapeDtypeStruct((64,), jnp.float32)
        text = compile_for_tpu(attend, *step, sinks, topology=topology, donate=3).as_text()
    # 8 MiB would fit in vector memory, where XLA likes to put operands; blocks are to be read from where they are
    made = made_like(jax.ShapeDtypeStruct((256, 16, 512), jnp.uint32), text)
    assert made.count("custom-call") == 1
    assert set(made) == {"parameter", "custom-call", "bitcast"}, set(made)


@compiled
def test_a_loop_of_steps_over_layers_keeps_every_cache_in_place() -> None:
    num_layers, model_dim, num_heads, num_kv_heads, head_dim = 3, 128, 32, 8, 128
    with lowering_for("tpu", "TPU v6 lite"):
        layout = KVLayout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=16, dtype="bfloat16")
        num_blocks = CACHE_BYTES // layout.block_bytes
        query, *_, cache, metadata = shapes(layout, num_heads, num_blocks=num_blocks, num_tokens=32, num_seqs=32)

        def steps(caches: Any, hidden: Any, weights: Any, metadata: AttentionMetadata) -> Any:
            def step(_: Any, carry: Any) -> Any:
                caches, hidden = carry
                caches = list(caches)
                for layer in range(num_layers):
                    heads = (hidden @ weights[layer]).reshape(32, -1, head_dim)
                    query, key, value = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
                    output, caches[layer] = paged_attention(query, key, value, caches[layer], metadata, scale=0.1)
                    hidden = output.reshape(32, -1)[:, :model_dim]
                return caches, hidden

            return jax.lax.fori_loop(0, 4, step, (caches, hidden))

        hidden = jax.ShapeDtypeStruct((32, model_dim), jnp.bfloat16)
        weight = jax.ShapeDtypeStruct((model_dim, (num_heads + 2 * num_kv_heads) * head_dim), jnp.bfloat16)
        program = compile_for_tpu(
            steps, [cache] * num_layers, hidden, [weight] * num_layers, metadata, topology="v6e:2x2", donate=0
        )
        check_is_in_place(program, layout, num_layers=num_layers, temp_bytes=8 * 2**20)
