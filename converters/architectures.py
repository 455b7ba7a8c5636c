"""The architectures whose checkpoints can be read, by the name that config.json gives them."""

from collections.abc import Mapping

from converters.conversion import Conversion
from converters.gemma import CONVERSION as GEMMA
from converters.gemma2 import CONVERSION as GEMMA2
from converters.gemma3 import CONVERSION as GEMMA3
from converters.gpt2 import CONVERSION as GPT2
from converters.gpt_neox import CONVERSION as GPT_NEOX
from converters.gptj import CONVERSION as GPTJ
from converters.llama import CONVERSION as LLAMA
from converters.mistral import CONVERSION as MISTRAL
from converters.mixtral import CONVERSION as MIXTRAL
from converters.olmo2 import CONVERSION as OLMO2
from converters.opt import CONVERSION as OPT
from converters.phi3 import CONVERSION as PHI3
from converters.qwen2 import CONVERSION as QWEN2
from converters.qwen3 import CONVERSION as QWEN3
from converters.qwen3_moe import CONVERSION as QWEN3_MOE
from converters.smollm3 import CONVERSION as SMOLLM3
from converters.starcoder2 import CONVERSION as STARCODER2

CONVERSIONS = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, STARCODER2, GPT2, GPT_NEOX, GPTJ, OPT,
    MIXTRAL, QWEN3_MOE,
)
"""One row per architecture."""

ARCHITECTURES: Mapping[str, Conversion] = {row.architecture: row for row in CONVERSIONS}
NAME_OF_MODEL_TYPE: Mapping[str, str] = {row.model_type: row.architecture for row in CONVERSIONS}
"""For configs that name no architecture."""
