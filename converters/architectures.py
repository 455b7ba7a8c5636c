"""The architectures whose checkpoints can be read, by the name that config.json gives them."""

from collections.abc import Mapping

from converters.conversion import Conversion
from converters.llama import CONVERSION as LLAMA
from converters.mistral import CONVERSION as MISTRAL
from converters.qwen2 import CONVERSION as QWEN2
from converters.qwen3 import CONVERSION as QWEN3

CONVERSIONS = (LLAMA, MISTRAL, QWEN2, QWEN3)
"""One row per architecture."""

ARCHITECTURES: Mapping[str, Conversion] = {row.architecture: row for row in CONVERSIONS}
NAME_OF_MODEL_TYPE: Mapping[str, str] = {row.model_type: row.architecture for row in CONVERSIONS}
"""For configs that name no architecture."""
