"""Mistral from Hugging Face: a Llama without biases, all of whose layers may have a window."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import equal_windows, rope, sizes
from converters.llama import rules
from jaxpaged.models.config import ModelConfig


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("layer_types")
    shape = sizes(reader, max_position_embeddings=131_072)
    return shape | rope(reader, shape) | {
        "windows": equal_windows(reader.get_or_null("sliding_window", 4096), shape["num_layers"]),
    }


def values(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": None if config.windows is None else config.windows[0]}


CONVERSION = Conversion(
    architecture="MistralForCausalLM", model_type="mistral", facts=facts, rules=rules, values=values
)
