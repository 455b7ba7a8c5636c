"""Every implementation of the table equals the reference on every case it claims, and the reference equals numbers
worked by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, TOLERANCES, Target, check_equals_the_reference

from pallas_kernels import AttentionMetadata, KVLayout, make_metadata, paged_attention
from pallas_kernels.cases import CASES, HEAD_SHAPES, MIXED, BatchCase, make_batch
from pallas_kernels.paged_attention.quantization import LARGEST, is_quantized

REFERENCE = next(target for target in TARGETS if target.name == "reference")
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


IN_EVERY_RUN = (
    "mixed",
    "mixed, bfloat16 and every option",
    "one head for all queries",
    "mixed, int8 and every option",
)
"""Cases that interpreted Hopper kernels, at 7 to 20 s a case, meet in every run; the others are slow tests."""


def is_slow(case: BatchCase, target: Target) -> bool:
    return target.name == "mosaic_gpu" and case.name not in IN_EVERY_RUN


@pytest.mark.parametrize(
    ("case", "target"),
    [
        pytest.param(
            case, target, id=f"{case.name}-{target}", marks=[pytest.mark.slow] if is_slow(case, target) else []
        )
        for case in CASES
        for target in TARGETS
        if target != REFERENCE and (case.dtype in target.dtypes or not is_quantized(case.dtype))
    ],
)
def test_equals_the_reference_and_reads_no_poison(case: BatchCase, target: Target) -> None:
    check_equals_the_reference(case, target)


def one_prompt(target: Target, length: int) -> tuple[object, AttentionMetadata]:
    """An empty layer cache of the smallest blocks of 2 and more, one head of dim 2, and the metadata of one prompt."""
    block_size = max(2, target.block_multiple)
    count = -(-length // block_size)
    layout = KVLayout(
        num_kv_heads=1, head_dim=2, block_size=block_size, dtype=target.dtypes[0], implementation=target.name
    )
    metadata = make_metadata(
        block_tables=np.arange(count, 0, -1, dtype=np.int32)[None],
        context_lens=[length],
        query_lens=[length],
        block_size=block_size,
        tile_size=2,
        key_chunk_tokens=block_size,
    )
    return layout.init(count + 1), metadata


LOG2 = float(np.log(2.0))
HAND = {
    # scores are query * key (the second axis is 0); equal scores give the mean of the values seen so far
    "mean of what was seen": ({}, [0.0, 0.0, 0.0], [(1.0, 8.0), (3.0, 4.0), (5.0, 0.0)],
                              [(1.0, 8.0), (2.0, 6.0), (3.0, 4.0)]),
    # keys log 2, 0, 0 weigh 2, 1, 1: (2 * 4 + 0 + 8) / 4 = 4, (2 * 0 + 4 + 4) / 4 = 2
    "weights are powers of two": ({}, [LOG2, 0.0, 0.0], [(4.0, 0.0), (0.0, 4.0), (8.0, 4.0)],
                                  [(4.0, 0.0), (8 / 3, 4 / 3), (4.0, 2.0)]),
    # a window of 2: the last token sees the last two only
    "window": ({"window": 2}, [LOG2, 0.0, 0.0], [(4.0, 0.0), (0.0, 4.0), (8.0, 4.0)],
               [(4.0, 0.0), (8 / 3, 4 / 3), (4.0, 4.0)]),
    # a sink of log 2 weighs 2 and brings nothing: 1 * v0 / (1 + 2), (v0 + v1) / 4, (v0 + v1 + v2) / 5
    "sink": ({"sinks": jnp.array([LOG2], jnp.float32)}, [0.0, 0.0, 0.0], [(3.0, 6.0), (1.0, 2.0), (1.0, 7.0)],
             [(1.0, 2.0), (1.0, 2.0), (1.0, 3.0)]),
    # a cap of c turns a score of c * artanh(log 2 / c) into log 2: weights 2, 1, 1 again
    "soft cap": ({"soft_cap": 1.0}, [float(np.arctanh(LOG2)), 0.0, 0.0], [(4.0, 0.0), (0.0, 4.0), (8.0, 4.0)],
                 [(4.0, 0.0), (8 / 3, 4 / 3), (4.0, 2.0)]),
}  # fmt: skip


@each_target
@pytest.mark.parametrize("hand", HAND)
def test_gives_the_numbers_worked_by_hand(hand: str, target: Target) -> None:
    options, scores, values, expected = HAND[hand]
    query = jnp.broadcast_to(jnp.array([1.0, 5.0], jnp.float32), (3, 1, 2))
    key = jnp.array([[[score, 0.0]] for score in scores], jnp.float32)
    value = jnp.array(values, jnp.float32)[:, None]
    with target.running():
        kv, metadata = one_prompt(target, 3)
        output, _ = paged_attention(
            query, key, value, kv, metadata, scale=1.0, implementation=target.name, **options
        )
        output = np.asarray(output)
    tolerance = 1e-6 if target.dtypes[0] == "float32" else TOLERANCES[target.dtypes[0]]
    np.testing.assert_allclose(output[:, 0], expected, rtol=tolerance)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(
            target, dtype, id=f"{target}-{dtype}",
            marks=[pytest.mark.slow] if target.name == "mosaic_gpu" and dtype == "float8_e4m3fn" else [],
        )  # fmt: skip
        for target in TARGETS
        for dtype in (target.dtypes[0], *(set(LARGEST) & set(target.dtypes)))
    ],
)
def test_a_sequence_that_is_not_finite_leaves_its_mates_alone(target: Target, dtype: str) -> None:
    # decodes 0 .. 3 share turns, sequences 4 and 5 have tiles; 1 and 4 bring a NaN value, 2 an infinite key
    case = BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED, dtype=dtype)
    assert [length for _, length in case.sequences] == [1, 1, 1, 1, 64, 40, 3]
    with target.running():
        batch = make_batch(case, target.name)
        attend = jax.jit(partial(paged_attention, **batch.options, implementation=target.name))
        healthy = np.asarray(attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)[0])
        value = batch.value.at[jnp.array([1, 40])].set(jnp.nan)
        key = batch.key.at[2].set(jnp.inf)
        output = np.asarray(attend(batch.query, key, value, batch.kv, batch.metadata)[0])
    assert np.isnan(output[[1, 2]]).all()
    assert np.isnan(output[40:68]).all(), "the tokens of sequence 4 that see token 40"
    mates = [0, 3, *range(68, len(output))]
    np.testing.assert_array_equal(output[mates], healthy[mates])


@pytest.mark.parametrize("name", ["native_cpu", "xla", "reference"])
def test_heads_can_be_split_over_devices_by_a_shard_map(name: str) -> None:
    case = BatchCase(
        name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED, window=40, has_sinks=True, key_chunk_tokens=32
    )
    batch = make_batch(case, name)
    options = {key: option for key, option in batch.options.items() if key != "sinks"}

    def attend(*operands: Any) -> tuple[jax.Array, Any]:
        *arrays, sinks = operands
        return paged_attention(*arrays, **options, sinks=sinks, implementation=name)

    operands = (batch.query, batch.key, batch.value, batch.kv, batch.metadata, batch.options["sinks"])
    mesh = jax.make_mesh((min(jax.device_count(), 2),), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec
    by_head = split(None, "heads")
    cache = split(None, None, None, "heads") if name == "reference" else by_head
    specs = (by_head, by_head, by_head, cache, split(), split("heads"))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(by_head, cache))
    output, kv = jax.jit(sharded)(*operands)
    expected, expected_kv = jax.jit(attend)(*operands)
    np.testing.assert_allclose(output, expected, rtol=TOLERANCES["float32"], atol=TOLERANCES["float32"])
    # block 0 is the null block: any padding row may be the one that stays there
    jax.tree.map(lambda given, told: np.testing.assert_array_equal(given[1:], told[1:]), kv, expected_kv)


@pytest.mark.parametrize("name", ["native_cpu", "xla", "reference"])
def test_each_device_can_have_sequences_of_its_own_in_a_shard_map(name: str) -> None:
    batch = make_batch(BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED), name)

    def attend(operands: Any) -> jax.Array:
        return paged_attention(*operands, **batch.options, implementation=name)[0]

    def attend_first(operands: Any) -> jax.Array:
        return attend(jax.tree.map(lambda leaf: leaf[0], operands))[None]

    operands = (batch.query, batch.key, batch.value, batch.kv, batch.metadata)
    num_devices = min(jax.device_count(), 2)
    mesh = jax.make_mesh((num_devices,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    own = jax.sharding.PartitionSpec("device")
    each = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * num_devices), operands)
    outputs = jax.jit(jax.shard_map(attend_first, mesh=mesh, in_specs=(own,), out_specs=own))(each)
    expected = jax.jit(attend)(operands)
    for output in outputs:
        np.testing.assert_allclose(output, expected, rtol=TOLERANCES["float32"], atol=TOLERANCES["float32"])


@each_target
def test_nothing_but_padding_gives_zeros_and_leaves_the_blocks_alone(target: Target) -> None:
    block_size = max(2, target.block_multiple)
    metadata = make_metadata(
        block_tables=np.zeros((0, 2), np.int32),
        context_lens=[],
        query_lens=[],
        block_size=block_size,
        num_tokens=3,
        num_seqs=2,
    )
    padding = jnp.full((3, 1, 2), jnp.nan)
    with target.running():
        layout = KVLayout(
            num_kv_heads=1, head_dim=2, block_size=block_size, dtype=target.dtypes[0], implementation=target.name
        )
        output, after = paged_attention(
            padding, padding, padding, layout.init(3), metadata, scale=1.0, implementation=target.name
        )
        output, after = np.asarray(output), jax.tree.map(np.asarray, after)
    assert not output.any()
    assert all(not leaf[1:].any() for leaf in jax.tree.leaves(after))
