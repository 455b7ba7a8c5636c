"""OLMo 2 from Hugging Face."""

from functools import partial
from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, norm
from converters.facts import rope, sizes
from converters.llama import rules

NORMS = (
    *norm("model.layers.{i}.post_attention_layernorm", "layers.{i}.attention_output_norm"),
    *norm("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.mlp_output_norm"),
)


def facts(reader: ConfigReader) -> dict[str, Any]:
    shape = sizes(reader, norm_eps=1e-5)
    return shape | rope(reader, shape) | {"attention_bias": reader.get("attention_bias", False)}


CONVERSION = Conversion(
    architecture="Olmo2ForCausalLM", model_type="olmo2", facts=facts, rules=partial(rules, norms=NORMS)
)
