"""Qwen 3 from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import rope, sizes, sliding_values, upper_layers_sliding
from converters.llama import rules


def facts(reader: ConfigReader) -> dict[str, Any]:
    shape = sizes(reader, head_dim=128, max_position_embeddings=32_768)
    return shape | rope(reader, shape) | {
        "attention_bias": reader.get("attention_bias", False),
        "windows": upper_layers_sliding(reader, shape["num_layers"]),
    }


CONVERSION = Conversion(
    architecture="Qwen3ForCausalLM", model_type="qwen3", facts=facts, rules=rules, values=sliding_values
)
