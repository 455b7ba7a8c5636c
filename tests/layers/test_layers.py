"""Linear, embedding, norm and MLP: numbers worked by hand, and what strict types ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpaged.layers.embedding import Embedding
from jaxpaged.layers.linear import Linear
from jaxpaged.layers.mlp import ACTIVATIONS, GatedMLP
from jaxpaged.layers.norm import RMSNorm


def test_a_linear_layer_multiplies_by_its_kernel_and_adds_its_bias():
    layer = Linear(2, 3, use_bias=True, dtype=jnp.float32)
    layer.kernel[...] = jnp.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    layer.bias[...] = jnp.array([0.5, 0.0, -0.5])
    np.testing.assert_array_equal(layer(jnp.array([[1.0, 10.0]])), [[41.5, 52.0, 62.5]])


def test_bfloat16_dots_are_summed_in_float32():
    layer = Linear(257, 1, use_bias=True, dtype=jnp.bfloat16)
    layer.kernel[...] = jnp.ones((1, 257), jnp.bfloat16)
    layer.bias[...] = jnp.array([1.0], jnp.bfloat16)
    outputs = layer(jnp.ones((2, 257), jnp.bfloat16))
    # a bfloat16 sum of ones stops at 256; 257 + 1 = 258 is exact in bfloat16
    np.testing.assert_array_equal(outputs, jnp.full((2, 1), 258.0, jnp.bfloat16))
    assert outputs.dtype == jnp.bfloat16


def test_a_linear_layer_refuses_mixed_types():
    layer = Linear(2, 2, use_bias=False, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="inputs are float32 and the kernel is bfloat16"):
        layer(jnp.ones((1, 2), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_tied_logits_are_the_dot_with_every_row_of_the_table(dtype, rows):
    embedding = Embedding(5, 4, dtype=dtype)
    embedding.table[...] = jax.random.normal(jax.random.key(0), (5, 4)).astype(dtype)
    hidden = jax.random.normal(jax.random.key(1), (rows, 4)).astype(dtype)
    logits = embedding.logits(hidden)
    expected = np.asarray(hidden, np.float64) @ np.asarray(embedding.table[...], np.float64).T
    assert logits.dtype == jnp.float32
    assert logits.shape == (rows, 5)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_an_embedding_reads_rows():
    embedding = Embedding(3, 2, dtype=jnp.float32)
    embedding.table[...] = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(embedding(jnp.array([2, 0], jnp.int32)), [[4.0, 5.0], [0.0, 1.0]])


def test_norm_divides_by_the_root_of_the_mean_square():
    norm = RMSNorm(2, eps=0.5, dtype=jnp.float32)
    norm.scale[...] = jnp.array([2.0, 3.0])
    # mean square (1 + 6) / 2 = 3.5, plus 0.5 is 4, root 2
    np.testing.assert_allclose(norm(jnp.array([[1.0, np.sqrt(6.0)]])), [[1.0, 1.5 * np.sqrt(6.0)]], rtol=1e-6)


def test_norm_of_bfloat16_keeps_its_type_and_does_not_overflow_in_the_square():
    norm = RMSNorm(2, eps=1e-6, dtype=jnp.bfloat16)
    normalised = norm(jnp.array([[1e18, 1e18]], jnp.bfloat16))
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normalised, jnp.ones((1, 2), jnp.bfloat16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_gates_its_upper_half(activation):
    mlp = GatedMLP(1, 1, activation=activation, use_bias=False, dtype=jnp.float32)
    for linear, kernel in ((mlp.gate, 2.0), (mlp.up, 3.0), (mlp.down, 5.0)):
        linear.kernel[...] = jnp.array([[kernel]])
    gate = {"silu": 2 / (1 + np.exp(-2.0)), "gelu": 1.9544997, "gelu_tanh": 1.9545977, "relu": 2.0}[activation]
    np.testing.assert_allclose(mlp(jnp.array([[1.0]])), [[gate * 3 * 5]], rtol=1e-6)


def test_layers_start_without_bias_where_none_is_asked_for():
    assert Linear(2, 2, use_bias=False, dtype=jnp.float32).bias is None
    assert set(nnx.state(Linear(2, 2, use_bias=True, dtype=jnp.float32))) == {"kernel", "bias"}
