"""Gemma 2 from Hugging Face."""

from functools import partial
from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, norm
from converters.facts import LLAMA_NAMES, rope, sizes, sliding_values, windows_by_type
from converters.llama import rules
from jaxpaged.models.config import ModelConfig

NAMES = {
    **LLAMA_NAMES,
    "activation": "hidden_activation",
    "attention_soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping",
    "window_rope_theta": "rope_local_base_freq",
}

NORMS = (
    *norm("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *norm("model.layers.{i}.post_attention_layernorm", "layers.{i}.attention_output_norm"),
    *norm("model.layers.{i}.pre_feedforward_layernorm", "layers.{i}.mlp_norm"),
    *norm("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.mlp_output_norm"),
)


def shared_facts(reader: ConfigReader, *, max_position_embeddings: int) -> dict[str, Any]:
    """Return what Gemma 2 and 3 state in one way."""
    reader.only("use_bidirectional_attention", False)
    reader.only("hidden_act", "gelu_pytorch_tanh")  # hidden_activation is what transformers obeys
    reader.ignore("sliding_window_size")
    return sizes(
        reader,
        NAMES,
        head_dim=256,
        ties_embeddings=True,
        activation="gelu_pytorch_tanh",
        max_position_embeddings=max_position_embeddings,
    ) | {"attention_bias": reader.get("attention_bias", False)}


def facts(reader: ConfigReader) -> dict[str, Any]:
    shape = shared_facts(reader, max_position_embeddings=8192)
    in_turn = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(shape["num_layers"])]
    return shape | rope(reader, shape) | {
        "windows": windows_by_type(reader, reader.get_or_null("sliding_window", 4096), in_turn),
        "extras": {
            "query_pre_attn_scalar": reader.get("query_pre_attn_scalar", 256),
            "attention_soft_cap": reader.get_or_null("attn_logit_softcapping", 50.0),
            "logit_soft_cap": reader.get_or_null("final_logit_softcapping", 30.0),
        },
    }


def shared_values(config: ModelConfig) -> dict[str, Any]:
    """Return what the files of Gemma 2 and 3 say in a way of their own."""
    scalar = config.extras.query_pre_attn_scalar
    # transformers takes whole numbers only
    return sliding_values(config) | {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}


CONVERSION = Conversion(
    architecture="Gemma2ForCausalLM", model_type="gemma2", facts=facts, rules=partial(rules, norms=NORMS), names=NAMES,
    values=shared_values,
)
