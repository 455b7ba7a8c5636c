"""Layer norms, plain MLPs, learned positions, projected embeddings, and how layers put their parts together."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.layers.attention import Attention
from jaxpaged.layers.decoder_layer import DecoderLayer, ParallelLayer, PostNormLayer
from jaxpaged.layers.embedding import Embedding, LearnedPositions, ProjectedEmbedding
from jaxpaged.layers.mlp import MLP
from jaxpaged.layers.norm import LayerNorm, RMSNorm
from jaxpaged.layers.rope import rotate


def test_a_layer_norm_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    norm = LayerNorm(2, eps=3.0, dtype=jnp.float32)
    norm.scale[...] = jnp.array([2.0, 10.0])
    norm.bias[...] = jnp.array([0.5, 0.0])
    # mean 3, variance 1, plus 3 is 4, root 2
    np.testing.assert_allclose(norm(jnp.array([[2.0, 4.0]])), [[-0.5, 5.0]])
    plain = LayerNorm(2, eps=3.0, dtype=jnp.float32, is_affine=False)
    np.testing.assert_allclose(plain(jnp.array([[2.0, 4.0]])), [[-0.5, 0.5]])


def test_a_norm_may_hold_the_difference_from_its_offset() -> None:
    norm = RMSNorm(2, eps=0.5, dtype=jnp.float32, offset=1.0)
    norm.scale[...] = jnp.array([0.0, 2.0])
    # root of (1 + 6) / 2 + 0.5 is 2
    np.testing.assert_allclose(norm(jnp.array([[1.0, np.sqrt(6.0)]])), [[0.5, 1.5 * np.sqrt(6.0)]], rtol=1e-6)


def test_a_plain_mlp_goes_up_and_down() -> None:
    mlp = MLP(1, 2, activation="relu", use_bias=True, dtype=jnp.float32)
    mlp.up.kernel[...] = jnp.array([[2.0], [-2.0]])
    mlp.up.bias[...] = jnp.array([1.0, 1.0])
    mlp.down.kernel[...] = jnp.array([[10.0, 100.0]])
    mlp.down.bias[...] = jnp.array([0.5])
    # up: 7 and -5; relu: 7 and 0
    np.testing.assert_array_equal(mlp(jnp.array([[3.0]])), [[70.5]])


def test_learned_positions_begin_behind_their_offset() -> None:
    positions = LearnedPositions(3, 1, offset=2, dtype=jnp.float32)
    positions.table[...] = jnp.arange(5.0)[:, None]
    np.testing.assert_array_equal(positions(jnp.array([0, 2], jnp.int32)), [[2.0], [4.0]])


def test_an_embedding_is_scaled_where_it_is_read_and_not_as_a_head() -> None:
    embedding = Embedding(2, 1, scale=3.0, dtype=jnp.float32)
    embedding.table[...] = jnp.array([[1.0], [2.0]])
    np.testing.assert_array_equal(embedding(jnp.array([1], jnp.int32)), [[6.0]])
    np.testing.assert_array_equal(embedding.logits(jnp.array([[5.0]])), [[5.0, 10.0]])


def test_a_projected_embedding_goes_inward_and_back_outward() -> None:
    embedding = ProjectedEmbedding(2, 1, 2, dtype=jnp.float32)
    embedding.table[...] = jnp.array([[1.0], [2.0]])
    embedding.inward.kernel[...] = jnp.array([[10.0], [100.0]])
    embedding.outward.kernel[...] = jnp.array([[1.0, -1.0]])
    np.testing.assert_array_equal(embedding(jnp.array([1], jnp.int32)), [[20.0, 200.0]])
    np.testing.assert_array_equal(embedding.logits(jnp.array([[7.0, 3.0]])), [[4.0, 8.0]])


@pytest.mark.parametrize(
    ("is_interleaved", "expected"),
    [(False, [-3.0, -4.0, 1.0, 2.0, 9.0]), (True, [-2.0, 1.0, -4.0, 3.0, 9.0])],
)
def test_a_quarter_turn_of_part_of_a_head(is_interleaved: bool, expected: list[float]) -> None:
    """Pairs are (1, 3), (2, 4), or interleaved (1, 2), (3, 4); the fifth dimension stays."""
    heads = jnp.array([[[1.0, 2.0, 3.0, 4.0, 9.0]]])
    turned = rotate(heads, jnp.zeros((1, 2)), jnp.ones((1, 2)), is_interleaved=is_interleaved)
    np.testing.assert_array_equal(turned, [[expected]])


class Times(RMSNorm):
    """A part that multiplies, in place of a norm or an MLP."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, hidden):
        return self.factor * hidden


class TimesAttention(Attention):
    """The same in place of attention."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, hidden, angles, kv, metadata, attention, rows=None):
        return self.factor * (hidden if rows is None else hidden[rows]), kv


def test_layers_add_their_parts_to_the_stream_as_they_say() -> None:
    hidden = jnp.array([[1.0], [2.0]])
    parts = {"attention": TimesAttention(2.0), "mlp": Times(3.0)}
    norms = {"attention_norm": Times(5.0), "mlp_norm": Times(7.0)}

    def through(layer, rows=None):
        return layer(hidden, None, "kv", None, print, rows)[0][:, 0].tolist()

    # h = 1 + 2 * 5 * 1 = 11; 11 + 3 * 7 * 11 = 242
    assert through(DecoderLayer(**parts, **norms)) == [242.0, 484.0]
    # h = 1 + 11 * 2 = 23; 23 + 13 * 3 * 23 = 920
    behind = {"attention_output_norm": Times(11.0), "mlp_output_norm": Times(13.0)}
    assert through(DecoderLayer(**parts, **behind, attention_norm=None, mlp_norm=None)) == [920.0, 1840.0]
    # 1 + 2 * 5 + 3 * 7 = 32; with one norm for both 1 + 10 + 15 = 26
    assert through(ParallelLayer(**parts, **norms)) == [32.0, 64.0]
    assert through(ParallelLayer(**parts, attention_norm=Times(5.0))) == [26.0, 52.0]
    # h = 5 * (1 + 2) = 15; 7 * (15 + 45) = 420
    assert through(PostNormLayer(**parts, **norms)) == [420.0, 840.0]
    for layer in (DecoderLayer(**parts, **norms), ParallelLayer(**parts, **norms), PostNormLayer(**parts, **norms)):
        assert through(layer, jnp.array([1])) == through(layer)[1:]
