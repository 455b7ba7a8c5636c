"""Facts that the config.json of many architectures states in one way: sizes, rotary positions, windows."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from converters.config_reader import ConfigReader
from jaxpaged.layers.rope import LongRopeScaling
from jaxpaged.models.config import LARGEST, ModelConfig

LLAMA_NAMES: Mapping[str, str] = {
    "model_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    "eos_token_ids": "eos_token_id",
    "windows": "sliding_window",
    "rotary_dim": "partial_rotary_factor",
}
"""Fields of ModelConfig that most config.json files call otherwise."""

ACTIVATION_NAMES: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

NAME_OF_ACTIVATION: Mapping[str, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""What a config.json is to call our activations."""

DTYPE_NAMES: Mapping[str, str] = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
"""float16 is widened: float32 holds it exactly, bfloat16 would not, and float16 itself overflows and is slow on CPU."""


def sizes(
    reader: ConfigReader,
    names: Mapping[str, str] = LLAMA_NAMES,
    *,
    head_dim: int | None = None,
    mlp_dim: int | None = None,
    ties_embeddings: bool = False,
    norm_eps: float = 1e-6,
    activation: str = "silu",
    max_position_embeddings: int = 2048,
) -> dict[str, Any]:
    """Return the sizes, norm, activation and tokens of a decoder, as ModelConfig's JSON has them.

    `names` says what the file calls them, the keywords what an absent attribute means in transformers; an absent
    `head_dim` is hidden_size / num_attention_heads unless given, and an MLP's size must be there unless given. Models
    without key-value heads have as many as query heads.
    """
    num_q_heads = reader.whole_number(names["num_q_heads"], largest=LARGEST["num_q_heads"])
    model_dim = reader.whole_number(names["model_dim"], largest=LARGEST["model_dim"])
    own_head_dim = reader.get("head_dim", head_dim)
    if own_head_dim is None:
        if model_dim % num_q_heads:
            raise ValueError(
                f"{names['model_dim']}={model_dim} must be a multiple of {names['num_q_heads']}={num_q_heads}"
            )
        own_head_dim = model_dim // num_q_heads
    return {
        "vocab_size": reader.required("vocab_size"),
        "model_dim": model_dim,
        "mlp_dim": reader.required(names["mlp_dim"]) if mlp_dim is None else reader.get(names["mlp_dim"], mlp_dim),
        "num_layers": reader.whole_number(names["num_layers"], largest=LARGEST["num_layers"]),
        "num_q_heads": num_q_heads,
        "num_kv_heads": reader.get(names["num_kv_heads"], num_q_heads) if "num_kv_heads" in names else num_q_heads,
        "head_dim": own_head_dim,
        "max_position_embeddings": reader.get(
            names.get("max_position_embeddings", "max_position_embeddings"), max_position_embeddings
        ),
        "norm_eps": reader.get(names["norm_eps"], norm_eps) if "norm_eps" in names else norm_eps,
        "tie_embeddings": reader.get(names["tie_embeddings"], ties_embeddings),
        "activation": activation_of(reader, names["activation"], activation),
        "bos_token_id": reader.get("bos_token_id"),
        "eos_token_ids": as_list(reader.get("eos_token_id")),
    }


def activation_of(reader: ConfigReader, name: str, default: str) -> str:
    """Return our name of the activation; ValueError, by name, for one that is not known."""
    activation = reader.get(name, default)
    if not isinstance(activation, str) or activation not in ACTIVATION_NAMES:
        raise ValueError(f"{name}={activation!r} is not known: it must be one of {sorted(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[activation]


def dtype_of(reader: ConfigReader, *, asked: str | None, default: str) -> str:
    """Return what weights are kept as: as asked, else as the file says, else `default`, which is what tensors are."""
    own = reader.get("dtype", reader.get("torch_dtype", default))
    if asked is not None:
        return asked
    if not isinstance(own, str) or own not in DTYPE_NAMES:
        raise ValueError(f"dtype={own!r} is not known: pass dtype= to choose float32 or bfloat16")
    return DTYPE_NAMES[own]


def as_list(token_ids: Any) -> list[Any]:
    """Return the ids of an eos_token_id, which may be absent, one id, or a list; they are checked by ModelConfig."""
    if token_ids is None:
        return []
    return token_ids if isinstance(token_ids, list) else [token_ids]


def rope(
    reader: ConfigReader,
    facts: Mapping[str, Any],
    *,
    theta: float = 10_000.0,
    theta_name: str = "rope_theta",
    rotary_factor: float | None = None,
    rotary_factor_name: str = "partial_rotary_factor",
    type_aliases: Mapping[str, str] = MappingProxyType({}),
    original_length: int | None = None,
) -> dict[str, Any]:
    """Return theta, scaling and rotary_dim, as ModelConfig's JSON has them; `facts` are the sizes.

    They come from `rope_parameters` (transformers 5) or from `rope_scaling` and attributes beside it (before).
    Precedence is that of transformers: what is inside the object wins over what is beside it. `theta` is what an absent
    one means. A model that can rotate a part of each head says by `rotary_factor` what part if the file does not.
    `type_aliases` are names that its files have for scalings, `original_length` what an absent
    `original_max_position_embeddings` means (max_position_embeddings if not given).
    """
    new, old = reader.get("rope_parameters"), reader.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(f"rope_parameters={new!r} and rope_scaling={old!r} contradict each other: keep one")
    parameters = old or new or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope parameters {parameters!r} must be an object")
    parameters = dict(parameters)
    beside_theta, beside_factor = reader.get(theta_name, theta), reader.get(rotary_factor_name)
    inside_factor = parameters.pop("partial_rotary_factor", None)
    factor = inside_factor if inside_factor is not None else beside_factor
    if rotary_factor is None and factor not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={factor!r} is not supported: this model rotates whole heads")
    own_theta = parameters.pop("rope_theta", None)
    return {
        "rope_theta": beside_theta if own_theta is None else own_theta,
        "rope_scaling": rope_scaling(
            reader, parameters, original_length or facts["max_position_embeddings"], type_aliases
        ),
        "rotary_dim": None
        if rotary_factor is None
        else rotary_dim(factor, rotary_factor, facts["head_dim"], rotary_factor_name),
    }


def rotary_dim(factor: Any, default: float, head_dim: Any, name: str) -> int | None:
    """Return how many dimensions of a head are rotated, None for all of them."""
    factor = default if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise ValueError(f"{name}={factor!r} must be a number above 0, up to 1")
    if not isinstance(head_dim, int):
        raise ValueError(f"head_dim={head_dim!r} must be a whole number")
    dims = int(head_dim * factor)
    if dims % 2 or dims < 2:
        raise ValueError(
            f"{name}={factor!r} of head_dim={head_dim} rotates {dims} dimensions: they must be an even "
            "number, from 2 on"
        )
    return None if factor == 1 else dims


def rope_scaling(
    reader: ConfigReader,
    parameters: Mapping[str, Any],
    original_length: Any,
    type_aliases: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Return the scaling that a rope object describes, theta and rotary factor taken out; None for none.

    `original_max_position_embeddings` beside it wins over the one inside; `original_length` stands for both.
    """
    parameters = dict(parameters)
    legacy_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", legacy_type or "default")
    outer_original = reader.get("original_max_position_embeddings")
    if not isinstance(rope_type, str):
        raise ValueError(f"rope_type={rope_type!r} must be a string")
    rope_type = type_aliases.get(rope_type, rope_type)
    if rope_type == "default":
        if parameters:
            raise ValueError(f"rope_type='default' has no {sorted(parameters)}: take them out")
        return None
    if rope_type in ("llama3", "yarn", "longrope"):
        if outer_original is not None:
            parameters["original_max_position_embeddings"] = outer_original
        elif parameters.get("original_max_position_embeddings") is None:
            parameters["original_max_position_embeddings"] = original_length
    elif parameters.get("original_max_position_embeddings") is not None:
        # written by some exporters; neither scaling reads it
        del parameters["original_max_position_embeddings"]
    return {"rope_type": rope_type} | parameters


def equal_windows(window: Any, num_layers: int) -> list[Any] | None:
    """Return the windows of a model that has one for all layers, or none."""
    return None if window is None else [window] * num_layers


def windows_by_type(
    reader: ConfigReader, window: Any, usual_types: Sequence[str]
) -> list[Any] | None:
    """Return the windows of a model whose layers are of types: `layer_types` in the file, else `usual_types`."""
    types = reader.get("layer_types", list(usual_types))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != len(usual_types) or any(kind not in known for kind in types):
        raise ValueError(f"layer_types={types!r} must be a list of {len(usual_types)} entries, each one of {known}")
    if "sliding_attention" not in types:
        return None
    if window is None:
        raise ValueError("sliding_window is missing: layer_types has layers of sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in types]


def upper_layers_sliding(reader: ConfigReader, num_layers: int) -> list[Any] | None:
    """Return the windows of a Qwen: with `use_sliding_window`, those of layers from max_window_layers on; else none."""
    own_window = reader.get_or_null("sliding_window", 4096)
    window = own_window if reader.flag("use_sliding_window", False) else None
    start = reader.get("max_window_layers", 28)
    if isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"max_window_layers={start!r} must be a whole number")
    usual = ["sliding_attention" if window is not None and i >= start else "full_attention" for i in range(num_layers)]
    return windows_by_type(reader, window, usual)


def usual_values(config: ModelConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the attributes that say a model's facts in most config.json files, in words of transformers 4 and 5.

    The way back from `sizes`, `rope` and the attributes that many have; `names` says what the file calls them. Whatever
    a file has in another way is for its converter to say.
    """
    facts = config.as_json()
    extras = {} if config.extras is None else dict.fromkeys(vars(config.extras)) | facts.pop("extras")
    values = {names.get(name, name): value for name, value in (facts | extras).items() if name != "architecture"}
    values[names.get("activation", "activation")] = NAME_OF_ACTIVATION[config.activation]
    values[names.get("eos_token_ids", "eos_token_id")] = one_or_list(config.eos_token_ids)
    factor_name = names.get("rotary_dim", "partial_rotary_factor")
    if config.rotary_dim is not None or factor_name != "partial_rotary_factor":
        values[factor_name] = rotary_factor(config)
    if isinstance(config.rope_scaling, LongRopeScaling):
        # transformers 4 looks for it here, and 5 here first
        values["original_max_position_embeddings"] = config.rope_scaling.original_max_position_embeddings
    if config.windows is not None:
        values["sliding_window"] = next(window for window in config.windows if window is not None)
    return values | {"torch_dtype": values.pop("dtype")}


def rotary_factor(config: ModelConfig) -> float:
    """Return the number of which `rotary_dim` is the whole part, times the head's dimensions."""
    if config.rotary_dim is None:
        return 1.0
    factor = config.rotary_dim / config.head_dim
    return factor if int(config.head_dim * factor) == config.rotary_dim else math.nextafter(factor, 1.0)


def one_or_list(token_ids: Sequence[int]) -> int | list[int] | None:
    """Return what a config.json has for an eos_token_id: null, one id, or a list of several."""
    return list(token_ids) if len(token_ids) > 1 else next(iter(token_ids), None)


def sliding_values(config: ModelConfig) -> dict[str, Any]:
    """Return the attributes by which files say which layers have a window, where not all have."""
    windows = config.windows or (None,) * config.num_layers
    return {
        "use_sliding_window": config.windows is not None,
        "sliding_window": next((window for window in windows if window is not None), None),
        "max_window_layers": sum(window is None for window in windows),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
