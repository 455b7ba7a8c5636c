"""Gemma 3, text, from Hugging Face."""

from functools import partial
from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import rope_scaling, windows_by_type
from converters.gemma2 import NAMES, NORMS, shared_facts, shared_values
from converters.llama import rules
from jaxpaged.models.config import ModelConfig

THETA, WINDOW_THETA = 1_000_000.0, 10_000.0


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("attn_logit_softcapping")  # transformers does not obey another value either
    reader.ignore("_sliding_window_pattern")  # stands beside layer_types, which counts
    shape = shared_facts(reader, max_position_embeddings=131_072)
    period = reader.whole_number("sliding_window_pattern", 6)
    in_turn = [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(shape["num_layers"])
    ]
    of_type = ropes_by_type(reader)
    whole, windowed = dict(of_type["full_attention"]), dict(of_type["sliding_attention"])
    length = shape["max_position_embeddings"]
    return shape | {
        "rope_theta": whole.pop("rope_theta"),
        "rope_scaling": rope_scaling(reader, whole, length),
        "windows": windows_by_type(reader, reader.get_or_null("sliding_window", 4096), in_turn),
        "extras": {
            "query_pre_attn_scalar": reader.get("query_pre_attn_scalar", 256),
            "window_rope_theta": windowed.pop("rope_theta"),
            "window_rope_scaling": rope_scaling(reader, windowed, length),
            "logit_soft_cap": reader.get("final_logit_softcapping"),
        },
    }


def ropes_by_type(reader: ConfigReader) -> dict[str, dict[str, Any]]:
    """Return the rope parameters of both types of layers, theta among them.

    transformers 5 writes an object for each; before, rope_theta and rope_scaling were those of the layers without a
    window, and rope_local_base_freq the others' theta.
    """
    given, scaling = reader.get("rope_parameters", {}), reader.get("rope_scaling")
    if not isinstance(scaling, dict | None):
        raise ValueError(f"rope_scaling={scaling!r} must be an object")
    if scaling is not None and given not in ({}, scaling):
        raise ValueError(f"rope_parameters={given!r} and rope_scaling={scaling!r} contradict each other: keep one")
    beside = {
        "full_attention": {"rope_theta": reader.get("rope_theta", THETA)},
        "sliding_attention": {"rope_theta": reader.get("rope_local_base_freq", WINDOW_THETA)},
    }
    if scaling is not None and not set(beside) & set(scaling):
        given = {"full_attention": scaling}
    elif not given:
        given = scaling or {}
    is_object = isinstance(given, dict) and all(isinstance(entry, dict | None) for entry in given.values())
    if not is_object or not set(given) <= set(beside):
        raise ValueError(f"rope_parameters={given!r} must be an object of objects, {sorted(beside)}")
    return {kind: beside[kind] | (given.get(kind) or {}) for kind in beside}


def values(config: ModelConfig) -> dict[str, Any]:
    scaling = config.as_json()["extras"].get("window_rope_scaling")
    if scaling is None:
        return shared_values(config)
    # only transformers 5 has words for a scaling of the layers with a window
    whole = config.as_json().get("rope_scaling") or {"rope_type": "default"}
    return shared_values(config) | {
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": whole | {"rope_theta": config.rope_theta},
            "sliding_attention": scaling | {"rope_theta": config.extras.window_rope_theta},
        },
    }


CONVERSION = Conversion(
    architecture="Gemma3ForCausalLM", model_type="gemma3_text", facts=facts, rules=partial(rules, norms=NORMS),
    names=NAMES, values=values,
)
