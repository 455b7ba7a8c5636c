"""Rotary frequencies are those of transformers, and depend on nothing but the model and its longest sequence."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
from llama_goldens import read

from converters.llama import CONVERSION
from jaxpaged.layers.rope import (
    DynamicScaling,
    LongRopeScaling,
    RopeTable,
    build_rope_table,
    parse_rope_scaling,
    rope_scaling_as_json,
    rotary_angles,
    rotate,
)


def table(case: str) -> RopeTable:
    config = CONVERSION.translate(tiny_checkpoints.hf_config(case), dtype=None, default_dtype="float32")
    return build_rope_table(
        rotary_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
        max_position_embeddings=config.max_position_embeddings,
        max_model_len=tiny_checkpoints.MAX_MODEL_LEN.get(case),
    )


@pytest.mark.parametrize("case", tiny_checkpoints.CASES)
def test_frequencies_and_attention_factor_are_those_of_transformers(case):
    golden, ours = read(case), table(case)
    # 4 units in the last place of float32: the two libraries round powers differently
    np.testing.assert_allclose(ours.inverse_frequencies, golden["frequencies"], rtol=5e-7)
    assert ours.attention_factor == pytest.approx(float(golden["attention_factor"]), rel=1e-12)


def test_the_scalings_differ_so_that_the_goldens_can_tell_them_apart():
    scaled = [c for c in tiny_checkpoints.CASES if c.startswith(("linear", "dynamic_b", "yarn", "llama3", "longrope"))]
    tables = {table(case) for case in scaled}
    assert len(tables | {table("mha_untied")}) == len(scaled) + 1


def test_dynamic_frequencies_are_the_original_ones_up_to_the_original_length():
    arguments = {"rotary_dim": 8, "theta": 100.0, "max_position_embeddings": 64}
    plain = build_rope_table(scaling=None, **arguments)
    scaling = DynamicScaling(factor=4.0)
    assert build_rope_table(scaling=scaling, max_model_len=64, **arguments) == plain
    assert build_rope_table(scaling=scaling, max_model_len=20, **arguments) == plain
    assert build_rope_table(scaling=scaling, max_model_len=65, **arguments) != plain


def test_longrope_takes_the_long_factors_above_the_original_length():
    scaling = LongRopeScaling(original_max_position_embeddings=32, short_factor=(2.0, 2.0), long_factor=(4.0, 4.0))
    arguments = {"rotary_dim": 4, "theta": 100.0, "max_position_embeddings": 64, "scaling": scaling}
    assert build_rope_table(max_model_len=32, **arguments).inverse_frequencies[0] == 0.5
    assert build_rope_table(max_model_len=33, **arguments).inverse_frequencies[0] == 0.25
    assert build_rope_table(**arguments).inverse_frequencies[0] == 0.25
    # sqrt(1 + log(64 / 32) / log(32)) = sqrt(1 + 1/5), whatever the length
    assert build_rope_table(**arguments).attention_factor == pytest.approx(math.sqrt(1.2))


def test_a_quarter_turn_swaps_the_halves_of_a_head():
    heads = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    # dimension i is paired with i + 2: (1, 3) -> (-3, 1) and (2, 4) -> (-4, 2)
    turned = rotate(heads, jnp.zeros((1, 2)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(turned, [[[-3.0, -4.0, 1.0, 2.0]]])


def test_angles_are_position_times_frequency_in_float32():
    cosines, sines = rotary_angles(jnp.array([0, 3], jnp.int32), RopeTable((1.0, 0.5), 2.0))
    expected = np.array([[0.0, 0.0], [3.0, 1.5]])
    np.testing.assert_allclose(cosines, 2 * np.cos(expected), rtol=1e-6)
    np.testing.assert_allclose(sines, 2 * np.sin(expected), rtol=1e-6)
    assert cosines.dtype == jnp.float32


def test_bfloat16_heads_are_rotated_in_float32_and_rounded_once():
    heads = jnp.linspace(-1, 1, 8).reshape(1, 2, 4).astype(jnp.bfloat16)
    cosines, sines = rotary_angles(jnp.array([5], jnp.int32), RopeTable((1.0, 0.1), 1.0))
    wide = rotate(heads.astype(jnp.float32), cosines, sines)
    turned = rotate(heads, cosines, sines)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("rope_type", "values", "said"),
    [
        ("su", {}, "rope_type='su'"),
        ("linear", {}, "factor"),
        ("linear", {"factor": "2"}, "factor='2'"),
        ("linear", {"factor": True}, "factor=True"),
        ("linear", {"factor": float("nan")}, "factor=nan"),
        ("linear", {"factor": 10**400}, "factor=1000"),
        ("linear", {"factor": 2, "beta_fast": 3}, "beta_fast"),
        ("yarn", {"factor": 2, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings=1.5"),
        ("yarn", {"factor": 2, "original_max_position_embeddings": 16, "truncate": 1}, "truncate=1"),
        (
            "llama3",
            {"factor": 2, "original_max_position_embeddings": 16, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor=4",
        ),
        ("longrope", {"original_max_position_embeddings": 4, "short_factor": [], "long_factor": [1]}, "short_factor"),
        ("longrope", {"original_max_position_embeddings": 4, "short_factor": [1, 0], "long_factor": [1, 1]}, "=0"),
    ],
)
def test_a_scaling_that_is_not_understood_is_refused_by_name(rope_type, values, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        parse_rope_scaling(rope_type, values)


@pytest.mark.parametrize("case", [case for case, changes in tiny_checkpoints.CASES.items() if "rope" in str(changes)])
def test_a_scaling_survives_json(case):
    scaling = CONVERSION.translate(tiny_checkpoints.hf_config(case), dtype=None, default_dtype="float32").rope_scaling
    assert scaling is not None
    values = rope_scaling_as_json(scaling)
    assert parse_rope_scaling(values.pop("rope_type"), values) == scaling


def test_cosines_are_computed_once_whatever_the_number_of_rotations():
    rope = table("llama3")
    half = len(rope.inverse_frequencies)

    def rotations(heads, positions):
        cosines, sines = rotary_angles(positions, rope)
        for _ in range(3):
            heads = jnp.tanh(rotate(heads, cosines, sines) @ jnp.eye(2 * half))
        return heads

    compiled = jax.jit(rotations).lower(jnp.ones((16, 4, 2 * half)), jnp.arange(16)).compile()
    assert len(re.findall(r" (?:cosine|sine)\(", compiled.as_text())) == 2
