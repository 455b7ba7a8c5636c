"""The meaning of a Llama's config.json: what is translated, what is harmless, what is refused by name."""

import pytest
from tiny_checkpoints import BASE

from converters.config_reader import HARMLESS_VALUES, WITHOUT_EFFECT
from converters.llama import CONVERSION
from jaxpaged.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

translate = CONVERSION.translate


def ours(**changes):
    values = {name: value for name, value in (BASE | changes).items() if value is not ...}
    return translate(values, dtype=None, default_dtype="float32")


def test_llama_3_1_8b_is_understood():
    config = translate(
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
        },
        dtype=None,
        default_dtype="float32",
    )
    assert (config.head_dim, config.num_kv_heads, config.dtype, config.rope_theta) == (128, 8, "bfloat16", 5e5)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_the_new_and_the_old_way_to_write_rope_mean_the_same():
    linear = {"factor": 2.0}
    new = ours(rope_theta=..., rope_parameters={"rope_type": "linear", "rope_theta": 100.0, **linear})
    old = ours(rope_scaling={"type": "linear", **linear})
    assert new == old
    assert new.rope_scaling == LinearScaling(factor=2.0)
    assert ours(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope_theta == 5.0
    assert ours(rope_theta=...).rope_theta == 10_000.0
    assert ours(rope_scaling=None).rope_scaling is None


def test_the_original_length_beside_the_object_wins_as_in_transformers():
    yarn = {"rope_type": "yarn", "factor": 2.0}
    inside = {**yarn, "original_max_position_embeddings": 8}
    assert ours(rope_scaling=inside).rope_scaling == YarnScaling(factor=2.0, original_max_position_embeddings=8)
    beside = ours(rope_scaling=inside, original_max_position_embeddings=4).rope_scaling
    assert beside == YarnScaling(factor=2.0, original_max_position_embeddings=4)
    assert ours(rope_scaling=yarn).rope_scaling == YarnScaling(factor=2.0, original_max_position_embeddings=64)


def test_longrope_factors_become_tuples():
    scaling = ours(
        rope_scaling={"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]},
        original_max_position_embeddings=16,
    ).rope_scaling
    assert scaling == LongRopeScaling(
        original_max_position_embeddings=16, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4
    )


def test_absent_heads_take_their_defaults():
    config = ours(num_key_value_heads=...)
    assert config.num_kv_heads == config.num_q_heads == 4
    assert config.head_dim == 8
    assert ours(head_dim=12).head_dim == 12


def test_float16_is_widened_and_a_chosen_type_wins():
    assert ours(torch_dtype="float16").dtype == "float32"
    assert ours(torch_dtype=...).dtype == "float32"
    assert ours(dtype="bfloat16").dtype == "bfloat16"
    assert translate(BASE, dtype="bfloat16", default_dtype="float32").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logit_scale": 2.0}, "'logit_scale' .2.0. is not known"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "no remote code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"torch_dtype": ["float32"]}, "is not known: pass dtype="),
        ({"eos_token_id": "2"}, "entry of eos_token_id='2' must be a whole number"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1]}}, "rope_type='mrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "finetuned": True}}, "finetuned"),
        ({"rope_scaling": {"factor": 2}}, "rope_type='default' has no"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "contradict"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        ours(**changes)


def test_an_attribute_has_one_treatment():
    assert not WITHOUT_EFFECT & set(HARMLESS_VALUES)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_every_attribute_that_transformers_writes_is_known():
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    assert translate(written, dtype=None, default_dtype="float32").model_dim == 4096
