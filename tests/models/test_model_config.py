"""ModelConfig: checked once, hashable, the same after JSON; generation defaults are read by name."""

import json

import pytest

from jaxpaged.layers.rope import Llama3Scaling, LongRopeScaling
from jaxpaged.models.config import GenerationDefaults, ModelConfig

VALUES = {
    "architecture": "LlamaForCausalLM", "vocab_size": 40, "model_dim": 16, "mlp_dim": 24, "num_layers": 2,
    "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "norm_eps": 1e-5,
    "rope_theta": 10000, "tie_embeddings": True, "dtype": "float32", "eos_token_ids": [1, 2], "bos_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 16, "low_freq_factor": 1,
          "high_freq_factor": 4}


@pytest.mark.parametrize(
    "scaling",
    [None, LLAMA3, {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1, 2],
                    "long_factor": [3, 4]}],
)
def test_a_config_survives_json_and_is_hashable(scaling):
    config = ModelConfig.from_json(VALUES | {"rope_scaling": scaling})
    again = ModelConfig.from_json(json.loads(json.dumps(config.as_json())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.rope_theta == 10000.0
    assert config.eos_token_ids == (1, 2)


def test_rope_scaling_is_a_value_of_its_own_type():
    assert ModelConfig.from_json(VALUES | {"rope_scaling": LLAMA3}).rope_scaling == Llama3Scaling(
        factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
    )
    with pytest.raises(ValueError, match="short_factor has 1 entries: it needs head_dim / 2 = 2"):
        ModelConfig.from_json(
            VALUES | {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 16,
                                       "short_factor": [1], "long_factor": [1, 2]}}
        )
    assert LongRopeScaling.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"num_layers": True}, "num_layers=True"),
        ({"model_dim": 16.0}, "model_dim=16.0"),
        ({"num_kv_heads": 3}, "num_q_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"tie_embeddings": 1}, "tie_embeddings=1"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"activation": []}, "activation=.* must be a string"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"eos_token_ids": [40]}, "token id 40"),
        ({"eos_token_ids": 2}, "eos_token_ids=2"),
        ({"bos_token_id": -1}, "token id -1"),
        ({"bos_token_id": "1"}, "bos_token_id='1'"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_json(VALUES | changes)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="mlp_dim"):
        ModelConfig.from_json({name: value for name, value in VALUES.items() if name != "mlp_dim"})


def test_generation_defaults_hold_what_the_file_sets_and_nothing_else():
    defaults = GenerationDefaults.from_generation_config(
        {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64, "do_sample": True, "eos_token_id": [1], "top_k": None}
    )
    assert defaults.as_dict() == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 64}
    assert GenerationDefaults.from_generation_config({}).as_dict() == {}
    with pytest.raises(ValueError, match="top_p='0.9'"):
        GenerationDefaults.from_generation_config({"top_p": "0.9"})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -5, "a number from 0 to 100"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_k", "a", "an integer from 1 to 2147483647"),
        ("min_p", float("nan"), "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number from 0.0001"),
        ("max_new_tokens", 0, "an integer from 1"),
    ],
)
def test_a_generation_default_that_no_request_could_use_is_refused_by_its_name_in_the_file(field, value, allowed):
    with pytest.raises(ValueError, match=rf"^{field}={value!r} .*{allowed}"):
        GenerationDefaults.from_generation_config({field: value})
