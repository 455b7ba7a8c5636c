"""Quantized caches: what is stored, that nothing more is lost than its rounding, and that blocks travel with scales."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_targets import TARGETS, check_equals_the_reference

from pallas_kernels import KVLayout, copy_blocks, gather_blocks, lowering_for, paged_attention, scatter_blocks
from pallas_kernels.cases import CASES, HEAD_SHAPES, MIXED, BatchCase, make_batch, with_options
from pallas_kernels.paged_attention.quantization import LARGEST, is_quantized, quantize

XLA = next(target for target in TARGETS if target.name == "xla")
each_dtype = pytest.mark.parametrize("dtype", LARGEST)
QUANTIZED_CASES = [case for case in CASES if is_quantized(case.dtype)]


@pytest.mark.parametrize("numpy", [np, jnp])
def test_a_head_is_stored_as_multiples_of_its_scale(numpy) -> None:
    # 254 / 127 = 2: 254, -3, 7 and 1 are 127, -1.5, 3.5 and 0.5 times it, and halves go to the even neighbour
    int8 = quantize(numpy.asarray([254.0, -3.0, 7.0, 1.0], np.float32), "int8", numpy)
    assert int8.scales == 2.0
    assert int8.stored.tolist() == [127, -2, 4, 0]
    assert int8.dequantized().tolist() == [254.0, -4.0, 8.0, 0.0]
    # 224 / 448 = 0.5: 17 is 34 times it, between 32 and 36, which have 3 bits behind the first
    float8 = quantize(numpy.asarray([-224.0, 17.0, 0.0], np.float32), "float8_e4m3fn", numpy)
    assert float8.scales == 0.5
    assert float8.dequantized().tolist() == [-224.0, 16.0, 0.0]


@each_dtype
def test_zeros_are_stored_with_scale_1_and_what_is_not_finite_stays_visible(dtype: str) -> None:
    heads = np.array([[0.0, 0.0], [1.0, np.nan], [np.inf, 1.0], [-np.inf, np.nan], [1e-42, 0.0], [3e38, -3e38]], "f4")
    for quantized in (quantize(heads, dtype, np), jax.jit(lambda heads: quantize(heads, dtype, jnp))(heads)):
        stored, scales = np.asarray(quantized.stored).astype(np.float32), np.asarray(quantized.scales)
        assert scales.dtype == np.float32
        assert scales[0] == 1.0
        assert np.isnan(scales[1:4]).all()
        assert not stored[:4].any()
        assert np.isfinite(stored).all(), "bytes are finite, whatever is quantized"
        assert np.isfinite(quantized.dequantized()[4:]).all()
        np.testing.assert_allclose(quantized.dequantized()[5], heads[5], rtol=1e-6)


@each_dtype
def test_numpy_and_a_compiled_program_store_the_same_bits(dtype: str) -> None:
    random = np.random.default_rng(0)
    heads = random.standard_normal((500, 4, 16)).astype(np.float32) * np.exp(random.uniform(-80, 80, (500, 1, 1)))
    heads = heads.astype(np.float32)
    given, expected = jax.jit(lambda heads: quantize(heads, dtype, jnp))(heads), quantize(heads, dtype, np)
    for leaf, told in zip(given, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), told.view(np.uint8))


@each_dtype
def test_whatever_is_stored_is_exact_in_bfloat16(dtype: str) -> None:
    stored = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(stored.astype(jnp.bfloat16).astype(np.float32), stored)


@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=lambda case: case.name)
def test_xla_equals_the_reference_in_float32(case: BatchCase) -> None:
    """Nothing but the order of sums differs: neither keys nor values are rounded once more."""
    check_equals_the_reference(with_options(case, input_dtype="float32"), XLA)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.04), ("float8_e4m3fn", 0.2)])
def test_outputs_are_near_those_of_a_float32_cache(dtype: str, bound: float) -> None:
    """Keys and values are of variance 1. The largest difference of an output was 0.028 in int8 and 0.133 in float8."""
    case = BatchCase(name="", heads=HEAD_SHAPES["llama3-8b"], sequences=MIXED, input_dtype="float32")

    def attend(case: BatchCase) -> np.ndarray:
        batch = make_batch(case, "reference")
        run = jax.jit(partial(paged_attention, **batch.options, implementation="reference"))
        return np.asarray(run(batch.query, batch.key, batch.value, batch.kv, batch.metadata)[0])

    difference = np.abs(attend(with_options(case, dtype=dtype)) - attend(case)).max()
    assert 0 < difference < bound


@each_dtype
@pytest.mark.parametrize(
    ("name", "platform", "lanes"),
    # the kernels for GPUs have rows of whole 32 bytes
    [("xla", "cpu", 4), ("reference", "cpu", 4), ("mosaic_gpu", "gpu", 32), ("triton_gpu", "gpu", 32)],
)
def test_blocks_are_copied_with_their_scales(name: str, platform: str, lanes: int, dtype: str) -> None:
    with lowering_for(platform, "NVIDIA H200" if platform == "gpu" else "cpu"):
        layout = KVLayout(num_kv_heads=2, head_dim=4, block_size=8, dtype=dtype, implementation=name)
        key, value = np.random.default_rng(0).standard_normal((2, 5, 8, 2, 4)).astype(np.float32)
        kv = layout.pack(key, value)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(kv)) == 5 * layout.block_bytes
        assert layout.block_bytes == 2 * 8 * 2 * (lanes + 4), "a byte for each lane, four for each scale"
        keys, values = layout.unpack(kv)
        np.testing.assert_allclose(keys, key, atol=np.abs(key).max() / 16)
        copied_keys, copied_values = layout.unpack(copy_blocks(kv, jnp.array([1, 2, 0]), jnp.array([4, 1, 0])))
        np.testing.assert_array_equal(copied_keys, keys[[0, 2, 2, 3, 1]])
        np.testing.assert_array_equal(copied_values, values[[0, 2, 2, 3, 1]])
        ids = jnp.array([3, 1])
        back = scatter_blocks(layout.init(5), ids, gather_blocks(kv, ids))
        is_back = np.isin(np.arange(5), [3, 1])[:, None, None, None]
        np.testing.assert_array_equal(layout.unpack(back)[1], values * is_back)
