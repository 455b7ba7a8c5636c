"""Products of linear layers: both implementations against float64, their derivatives, and whose rows are whose."""

import importlib
import itertools
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear, linear_at, linear_misfit, lowering_for, native_library
from pallas_kernels.linear.linear import LIBRARY

IMPLEMENTATIONS = ["native_cpu", "xla"]
DTYPES = ["float32", "bfloat16"]
ROWS = (1, 2, 3, 4, 5, 8, 11, 16, 17, 31, 33, 48, 64, 65, 100, 150)
"""All loops, with all numbers of vectors, full and not."""

needs_compiler = pytest.mark.skipif(native_library.find_compiler() is None, reason="no C++ compiler is installed")


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def check(inputs: np.ndarray, kernel: np.ndarray, implementation: str) -> None:
    result = jax.jit(partial(linear, implementation=implementation))(inputs, kernel)
    assert result.dtype == jnp.float32
    exact = inputs.astype(np.float64) @ kernel.astype(np.float64).T
    # each sum may lose a rounding per term in the worst order; a random walk of them loses far less
    magnitude = np.abs(inputs.astype(np.float64)) @ np.abs(kernel.astype(np.float64)).T
    bound = 4 * np.finfo(np.float32).eps * magnitude + 1e-30
    assert (np.abs(np.asarray(result) - exact) <= bound).all(), (inputs.shape, kernel.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_product(rows: int, implementation: str, dtype: str) -> None:
    for out_dim, in_dim in ((1, 1), (5, 7), (24, 16), (64, 172), (100, 288), (31, 1031), (770, 1100)):
        check(random(rows, in_dim, dtype=dtype), random(out_dim, in_dim, seed=1, dtype=dtype), implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hand_worked_numbers(implementation: str, dtype: str) -> None:
    inputs = np.array([[1, 2, 3], [-1, 0, 0.5]], dtype)
    kernel = np.array([[1, 0, 0], [1, 1, 1]], dtype)
    result = linear(inputs, kernel, implementation=implementation)
    np.testing.assert_array_equal(result, [[1, 6], [-1, -0.5]])


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 5, 0)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_in_is_nothing_or_zeros_out(shape: tuple[int, int, int], implementation: str) -> None:
    rows, out_dim, in_dim = shape
    result = linear(jnp.ones((rows, in_dim)), jnp.ones((out_dim, in_dim)), implementation=implementation)
    np.testing.assert_array_equal(result, np.zeros((rows, out_dim)))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fewest", "most"), [(1, 16), (17, 150)])
def test_bits_depend_neither_on_the_row_nor_on_how_many_there_are(fewest: int, most: int, dtype: str) -> None:
    kernel = random(100, 1101, seed=1, dtype=dtype)
    inputs = random(most, 1101, dtype=dtype)
    run = jax.jit(partial(linear, implementation="native_cpu"))
    whole = np.asarray(run(inputs, kernel))
    for rows in (fewest, fewest + 1, (fewest + most) // 2, most - 1):
        np.testing.assert_array_equal(run(inputs[most - rows :], kernel), whole[most - rows :])
    for columns in (1, 30, 99):
        np.testing.assert_array_equal(run(inputs, kernel[:columns]), whole[:, :columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [3, 70])
def test_what_is_not_finite_stays_in_its_row_and_column(rows: int, implementation: str, dtype: str) -> None:
    inputs, kernel = random(rows, 51, dtype=dtype), random(40, 51, seed=1, dtype=dtype)
    clean = np.asarray(linear(inputs, kernel, implementation=implementation))
    inputs[1, 50], kernel[39, 50] = np.nan, np.inf
    spoilt = np.asarray(linear(inputs, kernel, implementation=implementation))
    assert np.isnan(spoilt[1]).all()
    assert not np.isfinite(spoilt[:, 39]).any()
    others = np.ix_([0, *range(2, rows)], range(39))
    np.testing.assert_array_equal(spoilt[others], clean[others])


@needs_compiler
def test_derivatives_and_batches_are_those_of_xla() -> None:
    inputs, kernel, weights = random(6, 20), random(9, 20, seed=1), random(6, 9, seed=2)

    def loss(implementation: str, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return (jnp.tanh(linear(inputs, kernel, implementation=implementation)) * weights).sum()

    for transform in (jax.grad, jax.jacfwd):
        ours, theirs = (
            jax.jit(transform(partial(loss, implementation), argnums=(0, 1)))(inputs, kernel)
            for implementation in IMPLEMENTATIONS
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)
    many = jax.vmap(partial(linear, implementation="native_cpu"), in_axes=(0, None))(inputs[:, None], kernel)
    np.testing.assert_allclose(many[:, 0], linear(inputs, kernel, implementation="xla"), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_derivatives_inside_a_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs, kernel = random(6, 20), random(9, 20, seed=1)

    def loss(implementation: str, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        split, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
        product = partial(linear, implementation=implementation)
        sharded = jax.shard_map(product, mesh=mesh, in_specs=(split, whole), out_specs=split)
        return jnp.tanh(sharded(inputs, kernel)).sum()

    ours, theirs = (jax.grad(partial(loss, name), argnums=(0, 1))(inputs, kernel) for name in IMPLEMENTATIONS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)


def test_the_rule_that_picks() -> None:
    assert linear_misfit("xla", "bfloat16") is None
    assert linear_misfit("native_cpu", "float16") == "is for float32 and bfloat16, and these are float16"
    with lowering_for("tpu", "TPU v5 lite"):
        assert "runs on cpu only, and this is tpu" in (linear_misfit("native_cpu", "float32") or "")
    rounded = linear(jnp.ones((2, 4), jnp.bfloat16), jnp.full((3, 4), 0.5, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, np.full((2, 3), 2.0))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_cpu_the_compiled_one_is_picked(dtype: str) -> None:
    text = jax.jit(linear).lower(jnp.ones((2, 4), dtype), jnp.ones((3, 4), dtype)).as_text()
    assert f"@{LIBRARY.target('linear')}(" in text


@pytest.mark.parametrize(
    ("inputs", "kernel", "options", "message"),
    [
        (jnp.ones((2, 4)), jnp.ones((3, 4), jnp.bfloat16), {}, "inputs are float32 and the kernel is bfloat16"),
        (jnp.ones((2, 4)), jnp.ones((4, 3)), {}, r"inputs \(2, 4\) and kernel \(4, 3\) do not fit"),
        (jnp.ones(4), jnp.ones((3, 4)), {}, r"inputs \(4,\) and kernel \(3, 4\) do not fit"),
        (jnp.ones((2, 4)), jnp.ones((3, 4)), {"implementation": "mkl"}, "'mkl' is unknown: use one of native_cpu, xla"),
    ],
)
def test_bad_arguments_are_named(inputs, kernel, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear(inputs, kernel, **options)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize("machine", ["x86-64-v4", "x86-64-v3", "x86-64"])
def test_it_is_right_when_compiled_for_an_older_processor(monkeypatch, tmp_path, machine: str) -> None:
    if machine == "x86-64-v4" and " avx512vl " not in native_library._cpu_flags():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(native_library, "MACHINE_FLAGS", (f"-march={machine}",))
    module = importlib.import_module("pallas_kernels.linear.linear")  # the function has the name of its folder
    monkeypatch.setattr(module, "LIBRARY", replace(LIBRARY, prefix=f"{machine}."))
    for rows, dtype in itertools.product(ROWS, DTYPES):
        for out_dim, in_dim in ((5, 7), (100, 288), (130, 1101)):
            check(random(rows, in_dim, dtype=dtype), random(out_dim, in_dim, seed=1, dtype=dtype), "native_cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_kernel_of_many_is_multiplied_as_if_it_stood_alone(implementation: str, rows: int, dtype: str) -> None:
    inputs = jax.random.normal(jax.random.key(0), (rows, 37), dtype)
    kernels = jax.random.normal(jax.random.key(1), (3, 21, 37), dtype)
    at = jax.jit(partial(linear_at, implementation=implementation))
    for index in range(3):
        alone = linear(inputs, kernels[index], implementation=implementation)
        np.testing.assert_array_equal(at(inputs, kernels, jnp.int32(index)), alone)
    for index, nearest in ((-1, 0), (99, 2)):
        expected = linear(inputs, kernels[nearest], implementation=implementation)
        np.testing.assert_array_equal(at(inputs, kernels, jnp.int32(index)), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_derivative_of_one_kernel_of_many_is_that_of_the_product(implementation: str) -> None:
    inputs = jax.random.normal(jax.random.key(0), (4, 6))
    kernels = jax.random.normal(jax.random.key(1), (3, 5, 6))

    def loss(inputs, kernels):
        return jnp.sum(linear_at(inputs, kernels, jnp.int32(1), implementation=implementation) ** 2)

    found = jax.grad(loss, argnums=(0, 1))(inputs, kernels)
    product = inputs @ kernels[1].T
    np.testing.assert_allclose(found[0], 2 * product @ kernels[1], rtol=1e-4, atol=1e-4)
    expected = jnp.zeros_like(kernels).at[1].set(2 * product.T @ inputs)
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-4)


def test_one_kernel_of_many_is_refused_by_what_does_not_fit() -> None:
    inputs, kernels = jnp.zeros((2, 3)), jnp.zeros((4, 5, 3))
    with pytest.raises(ValueError, match="the index uint8: .* the index an int32 array without axes"):
        linear_at(inputs, kernels, jnp.zeros((), jnp.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        linear_at(inputs, kernels[0], jnp.int32(0))
