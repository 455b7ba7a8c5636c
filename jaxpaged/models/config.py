"""Facts stored with the weights: the shape of a model, and the generation defaults its makers recommend."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.layers.mlp import ACTIVATIONS
from jaxpaged.layers.rope import DynamicScaling, LongRopeScaling, RopeScaling
from jaxpaged.models import json_fields
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
class ExpertsConfig:
    """The facts of a mixture of experts."""

    num_experts: int
    num_experts_per_token: int
    expert_dim: int
    """Width of an expert, as mlp_dim is that of an MLP."""
    normalises_weights: bool
    """The weights of a token's experts add up to 1; otherwise they are the router's probabilities."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have one MLP of mlp_dim in place of experts, counted from 0."""

    def __post_init__(self) -> None:
        for name, largest in (("num_experts", 2**14), ("expert_dim", LARGEST["mlp_dim"])):
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number from 1 to {largest}")
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} must be from 1 to num_experts={self.num_experts}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of one checkpoint. A value out of range raises ValueError with its name and what is allowed.

    What many architectures share is here. What one of them has alone is in `extras`, of a type that its own file
    defines; only that file reads it.
    """

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
    rope_theta: float | None = None
    """None where positions are not rotary."""
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """How many dimensions of a head are rotated, the first ones; None is all."""
    windows: tuple[int | None, ...] | None = None
    """For each layer its sliding window in tokens, the token itself included, None for a layer that sees everything;
    None for the whole if no layer has one."""
    tie_embeddings: bool
    """The embedding table is the output head too."""
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    experts: ExpertsConfig | None = None
    """None where the MLPs are no mixtures."""
    dtype: str
    """What the weights are kept as: float32 or bfloat16."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sequence."""
    extras: Any = None
    """Facts of this architecture alone (a frozen dataclass), None where it has none."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number from 1 to {largest}")
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1e30:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number below 1e30")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        self._check_rope()
        self._check_windows()
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

    def _check_rope(self) -> None:
        if self.rope_theta is None:
            if self.rope_scaling is not None or self.rotary_dim is not None:
                raise ValueError("rope_scaling and rotary_dim need a rope_theta")
            return
        if self.rotary_dim is None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions")
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim % 2 or not 2 <= rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={rotary_dim} must be even, and from 2 to head_dim={self.head_dim}")
        check_rope_scaling(self.rope_scaling, rotary_dim)

    def _check_windows(self) -> None:
        if self.windows is None:
            return
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries: it needs one for each of the {self.num_layers} layers"
            )
        given = [window for window in self.windows if window is not None]
        if not given:
            raise ValueError("windows is None where no layer has a window, not a list of None")
        if min(given) < 1:
            raise ValueError(f"a window of {min(given)} tokens must be 1 or more: it counts the token itself")

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer, None where it sees everything."""
        return None if self.windows is None else self.windows[layer]

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain JSON values; fields that are None are left out."""
        return json_fields.as_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], extras_type: type | None = None) -> "ModelConfig":
        """Return the config that `as_json` wrote; unknown, missing and ill-typed fields raise ValueError by name.

        `extras_type` is what the architecture's extras are (`registry.parse_config` knows it).
        """
        values = dict(values)
        extras = values.pop("extras", None)
        config = json_fields.parse(cls, values)
        if extras_type is None and extras is None:
            return config
        if extras_type is None or not isinstance(extras, dict):
            kind = "no extras" if extras_type is None else "an object as extras"
            raise ValueError(f"extras={extras!r}: {config.architecture} has {kind}")
        return dataclasses.replace(config, extras=json_fields.parse(extras_type, extras))


def check_rope_scaling(scaling: RopeScaling | None, rotary_dim: int) -> None:
    """Raise ValueError unless the scaling fits heads of which `rotary_dim` dimensions are rotated."""
    if isinstance(scaling, LongRopeScaling):
        for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
            if len(factors) != rotary_dim // 2:
                raise ValueError(f"{name} has {len(factors)} entries: it needs head_dim / 2 = {rotary_dim // 2}")
    if isinstance(scaling, DynamicScaling) and rotary_dim < 4:
        raise ValueError(f"head_dim={rotary_dim} must be 4 or more for dynamic rope scaling")


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
