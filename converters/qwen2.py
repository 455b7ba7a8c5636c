"""Qwen 2 and 2.5 from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import rope, sizes, sliding_values, upper_layers_sliding
from converters.llama import rules


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("use_mrope", False)
    shape = sizes(reader, max_position_embeddings=32_768)
    return shape | rope(reader, shape) | {
        "windows": upper_layers_sliding(reader, shape["num_layers"]),
    }


CONVERSION = Conversion(
    architecture="Qwen2ForCausalLM", model_type="qwen2", facts=facts, rules=rules, values=sliding_values
)
