"""Facts stored with the weights: the shape of a model, and the generation defaults its makers recommend."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.layers.mlp import ACTIVATIONS
from jaxpaged.layers.rope import (
    DynamicScaling,
    LongRopeScaling,
    RopeScaling,
    parse_rope_scaling,
    rope_scaling_as_json,
)
from jaxpaged.sampling_params import SamplingParams

DTYPES = ("float32", "bfloat16")
"""What weights may be kept as. float16 checkpoints are widened to float32 or rounded to bfloat16 when converted."""

LARGEST = {
    "vocab_size": 2**24,
    "model_dim": 2**20,
    "mlp_dim": 2**22,
    "num_layers": 2**12,
    "num_q_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**30,
}
"""Upper bounds of the sizes: far above any model, low enough that a hostile config cannot exhaust the host."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of one checkpoint. A value out of range raises ValueError with its name and what is allowed."""

    architecture: str
    """Name in the registry, for example LlamaForCausalLM."""
    vocab_size: int
    model_dim: int
    mlp_dim: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest sequence the checkpoint was made for, in tokens."""
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool
    """The embedding table is the output head too."""
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    dtype: str
    """What the weights are kept as: float32 or bfloat16."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number from 1 to {largest}")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < 1e30:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions")
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known: it must be one of {sorted(ACTIVATIONS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}: pass dtype= to convert the weights")
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"token id {token_id!r} (bos_token_id or eos_token_ids) must be a whole number from 0 to "
                    f"{self.vocab_size - 1}"
                )

    def _check_rope_scaling(self, scaling: RopeScaling) -> None:
        if isinstance(scaling, LongRopeScaling):
            for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
                if len(factors) != self.head_dim // 2:
                    raise ValueError(f"{name} has {len(factors)} entries: it needs head_dim / 2 = {self.head_dim // 2}")
        if isinstance(scaling, DynamicScaling) and self.head_dim < 4:
            raise ValueError(f"head_dim={self.head_dim} must be 4 or more for dynamic rope scaling")

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON values; fields that are None are left out."""
        values = dict(vars(self))
        values["eos_token_ids"] = list(self.eos_token_ids)
        if self.rope_scaling is not None:
            values["rope_scaling"] = rope_scaling_as_json(self.rope_scaling)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Return the config that `as_json` wrote; unknown, missing and ill-typed fields raise ValueError by name."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown fields {unknown}: this checkpoint was written by another version")
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and values.get(name) is None
        ]
        if missing:
            raise ValueError(f"missing fields {missing}")
        arguments = {name: _parse_field(name, value) for name, value in values.items() if value is not None}
        return cls(**arguments)


def _parse_field(name: str, value: object) -> Any:
    """Return a JSON value in the type of the field of ModelConfig; ValueError, by name, if it is not of that kind."""
    if name in LARGEST or name == "bos_token_id":
        return parse_integer(name, value)
    if name in ("norm_eps", "rope_theta"):
        return parse_number(name, value)
    if name == "eos_token_ids":
        if not isinstance(value, list):
            raise ValueError(f"eos_token_ids={value!r} must be a list of token ids")
        return tuple(parse_integer("token id in eos_token_ids", token_id) for token_id in value)
    if name == "rope_scaling":
        if not isinstance(value, dict) or not isinstance(value.get("rope_type"), str):
            raise ValueError(f"rope_scaling={value!r} must be an object with a rope_type")
        return parse_rope_scaling(value["rope_type"], {key: value[key] for key in value if key != "rope_type"})
    is_text = name in ("architecture", "activation", "dtype")
    if not isinstance(value, str if is_text else bool):
        raise ValueError(f"{name}={value!r} must be {'a string' if is_text else 'true or false'}")
    return value


def parse_integer(name: str, value: object) -> int:
    """Return a JSON value that must be a whole number; ValueError, by name, otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a whole number")
    return value


def parse_number(name: str, value: object) -> float:
    """Return a JSON value that must be a finite number; ValueError, by name, otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise ValueError(f"{name}={value!r} must be a number")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json sets; None where it says nothing. Used where a user did not set it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def as_dict(self) -> dict[str, float | int]:
        """Return the values that are set, by the names of SamplingParams."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_generation_config(cls, values: Mapping[str, Any]) -> "GenerationDefaults":
        """Return the defaults in a Hugging Face generation_config.json; other keys do not concern sampling here.

        ValueError with the field, its value and what is allowed for one that no request could use.
        """
        names = {field.name: field.name for field in dataclasses.fields(cls)} | {"max_tokens": "max_new_tokens"}
        chosen: dict[str, Any] = {}
        for ours, theirs in names.items():
            if values.get(theirs) is not None:
                try:
                    chosen[ours] = getattr(SamplingParams(**{ours: values[theirs]}), ours)
                except ValueError as error:
                    raise ValueError(str(error).replace(ours, theirs, 1)) from error
        return cls(**chosen)
