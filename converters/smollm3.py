"""SmolLM 3 from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import rope, sizes, sliding_values, windows_by_type
from converters.llama import rules
from jaxpaged.models.config import ModelConfig


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.ignore("max_window_layers")
    shape = sizes(reader, ties_embeddings=True, max_position_embeddings=32_768)
    layers = range(shape["num_layers"])
    period = reader.whole_number("no_rope_layer_interval", 4)
    rotates = reader.get("no_rope_layers", [int((layer + 1) % period != 0) for layer in layers])
    if not isinstance(rotates, list) or len(rotates) < len(layers) or any(entry not in (0, 1) for entry in rotates):
        raise ValueError(f"no_rope_layers={rotates!r} must have an entry for each layer, 1 for one that rotates or 0")
    own_window = reader.get("sliding_window")  # asked for always: files say null where it is not used
    has_windows = reader.flag("use_sliding_window", False) and own_window is not None
    window = own_window if has_windows else None
    usual = ["sliding_attention" if has_windows and not rotates[layer] else "full_attention" for layer in layers]
    return shape | rope(reader, shape, theta=2_000_000.0) | {
        "attention_bias": reader.get("attention_bias", False),
        "mlp_bias": reader.get("mlp_bias", False),
        "windows": windows_by_type(reader, window, usual),
        "extras": {"unrotated_layers": [layer for layer in layers if not rotates[layer]]},
    }


def values(config: ModelConfig) -> dict[str, Any]:
    unrotated = config.extras.unrotated_layers
    return sliding_values(config) | {
        "no_rope_layers": [int(layer not in unrotated) for layer in range(config.num_layers)],
        "pad_token_id": None,  # the one that transformers assumes may be no token of this vocabulary
    }


CONVERSION = Conversion(
    architecture="SmolLM3ForCausalLM", model_type="smollm3", facts=facts, rules=rules, values=values
)
