"""Gemma from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import rope, sizes
from converters.llama import rules


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("use_bidirectional_attention", False)
    reader.only("hidden_activation", "gelu_pytorch_tanh", "gelu")  # hidden_act is what transformers obeys
    shape = sizes(
        reader, head_dim=256, ties_embeddings=True, activation="gelu_pytorch_tanh", max_position_embeddings=8192
    )
    if shape["activation"] == "gelu":
        shape["activation"] = "gelu_tanh"  # early files say gelu and mean its tanh form, as transformers knows
    return shape | rope(reader, shape) | {"attention_bias": reader.get("attention_bias", False)}


CONVERSION = Conversion(architecture="GemmaForCausalLM", model_type="gemma", facts=facts, rules=rules)
