"""What the Triton kernels promise beyond being right: even work, nothing read that nobody sees, and programs for an
H200 that need none to compile."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, Target, check_equals_the_reference, triton_interpreter

from pallas_kernels import lowering_for, paged_attention
from pallas_kernels.aot import compile_for_h200, missing_for_h200
from pallas_kernels.cases import HEAD_SHAPES, BatchCase, HeadShape, make_batch
from pallas_kernels.paged_attention.gpu_items import cut_into_items
from pallas_kernels.paged_attention.triton_gpu_kernel import (
    MERGED_AT_ONCE,
    KernelShape,
    decode_float8,
    heads_of_rows,
    multiply,
)
from pallas_kernels.paged_attention.triton_gpu_layout import pieces

TARGET = next(target for target in TARGETS if target.name == "triton_gpu")


def test_pieces_are_powers_of_two_that_cover_a_row_once() -> None:
    assert pieces(16) == ((0, 16),)
    assert pieces(80) == ((0, 64), (64, 16))
    assert pieces(240) == ((0, 128), (128, 64), (192, 32), (224, 16))
    assert pieces(256) == ((0, 256),)


@pytest.mark.parametrize(
    ("group", "head", "part", "rows", "expected"),
    [(3, 2, 0, 16, [6, 7, 8] + [8] * 13), (71, 0, 1, 64, [*range(64, 71), *[70] * 57])],
)
def test_rows_of_a_decode_never_leave_their_group(
    group: int, head: int, part: int, rows: int, expected: list[int]
) -> None:
    # programs that write one another's rows are a race, which an interpreter of one after the other does not show
    shape = KernelShape(
        num_kv_heads=4, group=group, lanes=16, block_size=16, dtype=jnp.dtype(jnp.bfloat16), is_quantized=False,
        scale=1.0, window=None, soft_cap=None,
    )  # fmt: skip
    assert shape.rows(group) == rows
    assert heads_of_rows(shape, jnp.int32(head), jnp.int32(part), rows).tolist() == expected


def test_float8_is_made_of_its_bits_exactly() -> None:
    bits = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)  # the others are NaN
    expected = bits.view(jnp.float8_e4m3fn).astype(np.float32)
    given = np.asarray(jax.jit(decode_float8)(bits))
    np.testing.assert_array_equal(given, expected)
    assert given.max() == 448.0


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_products_of_float32_are_asked_for_in_full_precision(dtype: str, precision: str) -> None:
    # a CPU has no other, so its outputs do not show it; a GPU would take tf32
    square = jnp.zeros((16, 16), jnp.dtype(dtype))
    (product,) = jax.make_jaxpr(partial(multiply, contracted=0))(square, square).eqns
    assert product.params["precision"] == (jax.lax.Precision[precision],) * 2
    assert product.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(
    "case",
    [
        # more query heads than a program has rows
        BatchCase(name="group of 71", heads=HeadShape(71, 1, 16), sequences=((90, 1), (30, 9)), tile_size=4,
                  has_sinks=True),
        BatchCase(name="block of 24, tiles of 5", heads=HEAD_SHAPES["smollm-135m"], sequences=((50, 1), (49, 26)),
                  block_size=24, key_chunk_tokens=48, tile_size=5, window=30),
        BatchCase(name="heads of 112", heads=HeadShape(2, 1, 112), sequences=((20, 1), (35, 18)), dtype="bfloat16"),
        BatchCase(name="heads of 112, int8, block of 24", heads=HeadShape(2, 1, 112), sequences=((20, 1), (35, 18)),
                  block_size=24, key_chunk_tokens=48, dtype="int8"),
        BatchCase(name="more sequences than tokens", heads=HEAD_SHAPES["stories260k"], sequences=((20, 1), (7, 2)),
                  num_padding_tokens=0, num_padding_seqs=9),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_shapes_of_its_own_equal_the_reference(case: BatchCase) -> None:
    check_equals_the_reference(case, TARGET)


def test_a_decode_of_more_items_than_are_merged_at_once_equals_the_reference() -> None:
    # 47 chunks of 32 keys, and no more than one for each program: 47 items
    items = cut_into_items(jnp.array([1500, 3]), 32, None, num_items=64, min_chunks=1)
    assert items.first_items.tolist() == [0, 47, 48]
    assert items.first_items[1] > 2 * MERGED_AT_ONCE
    case = BatchCase(
        name="", heads=HeadShape(4, 1, 16), sequences=((1500, 1), (3, 1)), has_sinks=True, num_padding_tokens=0
    )
    check_equals_the_reference(case, Target(TARGET.name, partial(triton_interpreter, 64)))


@pytest.mark.parametrize("turn_tokens", [16, 128])
def test_turns_of_decodes_that_may_be_tuned_leave_outputs_as_they_are(turn_tokens: int) -> None:
    case = BatchCase(
        name="", heads=HEAD_SHAPES["stories260k"], sequences=((300, 1), (1, 1), (129, 1), (70, 9)), window=200,
        has_sinks=True,
    )  # fmt: skip
    running = partial(triton_interpreter, decode_turn_tokens=turn_tokens, decode_warps=8)
    check_equals_the_reference(case, Target(TARGET.name, running))


def test_what_is_before_the_window_of_a_decode_is_not_read() -> None:
    case = BatchCase(
        name="", heads=HEAD_SHAPES["stories260k"], sequences=((100, 1), (70, 1)), window=20, num_padding_tokens=0
    )
    with TARGET.running():
        batch = make_batch(case, TARGET.name)
        attend = jax.jit(partial(paged_attention, **batch.options, implementation=TARGET.name))
        healthy = np.asarray(attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)[0])
        # the blocks up to key 79 and 47, of which the windows see none and the chunks some
        gone = np.concatenate([batch.metadata.block_tables[0, :5], batch.metadata.block_tables[1, :3]])
        kv = jax.tree.map(lambda leaf: leaf.at[gone].set(jnp.nan), batch.kv)
        output = np.asarray(attend(batch.query, batch.key, batch.value, kv, batch.metadata)[0])
    np.testing.assert_array_equal(output, healthy)


# AHEAD OF TIME: the real compiler, for an H200 that is not here

compiled = pytest.mark.skipif(missing_for_h200() is not None, reason=str(missing_for_h200()))
says_deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
"""jax says it when it lowers a kernel, from 0.11 on; so does the summary of the row."""
NUM_BLOCKS = 8192


def shapes(case: BatchCase) -> tuple[Any, ...]:
    """Shapes of query, key, value, layer cache of NUM_BLOCKS and metadata of a batch."""
    batch = make_batch(case, TARGET.name)
    arrays = (batch.query, batch.key, batch.value, batch.kv, batch.metadata)
    *small, kv, metadata = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    kv = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((NUM_BLOCKS, *leaf.shape[1:]), leaf.dtype), kv)
    return *small, kv, metadata


def check_is_in_place(program: jax.stages.Compiled, kv: Any, *, num_layers: int, temp_bytes: int) -> None:
    """All caches are aliased, little else is allocated, and nothing of a cache's shape is made but by the writes."""
    memory = program.memory_analysis()
    leaves = jax.tree.leaves(kv)
    assert memory.alias_size_in_bytes == num_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert memory.temp_size_in_bytes <= temp_bytes
    for leaf in leaves:
        shape = ",".join(map(str, leaf.shape))
        made = re.findall(rf" = \(?\w+\[{shape}\]\S* ([\w-]+)\(", program.as_text())
        assert "parameter" in made, "the pattern finds caches"
        assert set(made) <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}, set(made)


@compiled
@says_deprecated
@pytest.mark.parametrize(
    ("heads", "block_size", "dtype", "options"),
    [
        (HEAD_SHAPES["llama3-8b"], 16, "bfloat16", {}),
        (HEAD_SHAPES["smollm-135m"], 64, "float32", {"window": 128, "soft_cap": 30.0}),
        (HEAD_SHAPES["llama3-8b"], 16, "float8_e4m3fn", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (HEAD_SHAPES["llama3-8b"], 16, "float32", {}),
                (HEAD_SHAPES["llama3-8b"], 24, "bfloat16", {"window": 4096, "soft_cap": 30.0}),
                (HEAD_SHAPES["gpt-oss-20b"], 16, "bfloat16", {"window": 128, "has_sinks": True}),
                (HEAD_SHAPES["stories260k"], 8, "float32", {}),
                (HEAD_SHAPES["phi-3-mini"], 16, "bfloat16", {}),
                (HEAD_SHAPES["phi-2"], 16, "bfloat16", {}),
                (HEAD_SHAPES["phi-2"], 16, "float32", {}),
                (HEAD_SHAPES["opt-125m"], 256, "bfloat16", {}),
                (HEAD_SHAPES["gemma-2b"], 16, "bfloat16", {}),
                (HEAD_SHAPES["gemma-2b"], 16, "float32", {"soft_cap": 30.0, "window": 1024}),
                (HeadShape(71, 1, 64), 16, "bfloat16", {}),
                (HEAD_SHAPES["llama3-8b"], 24, "int8", {"window": 4096, "soft_cap": 30.0}),
                (HEAD_SHAPES["gpt-oss-20b"], 16, "float8_e4m3fn", {"window": 128, "has_sinks": True}),
                (HEAD_SHAPES["phi-2"], 16, "float8_e4m3fn", {}),
                (HEAD_SHAPES["phi-3-mini"], 32, "int8", {}),
                (HEAD_SHAPES["gemma-2b"], 16, "float8_e4m3fn", {"soft_cap": 30.0, "window": 1024}),
            )
        ),
    ],
)
def test_compiles_for_an_h200_in_place_and_spills_no_register(
    heads: HeadShape, block_size: int, dtype: str, options: dict[str, Any]
) -> None:
    # asks XLA to fail where a kernel of the program spills
    strictly = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    case = BatchCase(
        name="", heads=heads, sequences=((500, 1),) * 30 + ((300, 200),), block_size=block_size, dtype=dtype,
        tile_size=64, key_chunk_tokens=16 * block_size, **options,
    )  # fmt: skip
    with lowering_for("cuda", "NVIDIA H200"):
        batch = make_batch(case, TARGET.name)
        step = shapes(case)
        program = compile_for_h200(
            partial(paged_attention, implementation=TARGET.name, **batch.options), *step, donate=3,
            compiler_options=strictly,
        )  # fmt: skip
    # the partial outputs of items, of which one head for all queries has most
    check_is_in_place(program, step[3], num_layers=1, temp_bytes=32 * 2**20)


@compiled
@says_deprecated
def test_a_loop_of_steps_over_layers_keeps_every_cache_in_place() -> None:
    num_layers, heads = 3, HeadShape(32, 8, 128)
    case = BatchCase(
        name="", heads=heads, sequences=((500, 1),) * 32, dtype="bfloat16", num_padding_tokens=0, num_padding_seqs=0
    )
    with lowering_for("cuda", "NVIDIA H200"):
        query, key, _, kv, metadata = shapes(case)

        def steps(caches: Any, query: Any, key: Any, metadata: Any) -> Any:
            def step(_: Any, carry: Any) -> Any:
                caches, query = list(carry[0]), carry[1]
                for layer in range(num_layers):
                    query, caches[layer] = paged_attention(
                        query, key, key, caches[layer], metadata, scale=0.1, implementation=TARGET.name
                    )
                return caches, query

            return jax.lax.fori_loop(0, 4, step, (caches, query))

        program = compile_for_h200(steps, [kv] * num_layers, query, key, metadata, donate=0)
    check_is_in_place(program, kv, num_layers=num_layers, temp_bytes=32 * 2**20)
