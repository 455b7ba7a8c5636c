"""Rotary position embeddings (Su et al. 2021) and the ways checkpoints stretch them to longer contexts.

The frequencies are what transformers computes, in the same float32 steps. They are fixed when the model is built:
the two scalings whose frequencies depend on a length (dynamic, longrope) take `max_model_len`, the longest
sequence the engine will ever hold, in place of the length of the sequence at hand. Then a key written early stays
right when its sequence grows, and no sequence's numbers depend on its company in the batch. Where `max_model_len`
is the length of the sequence, or within the original length, that is transformers' own result.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware: theta grown for the length in use."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023)."""

    factor: float
    original_max_position_embeddings: int
    """Length in tokens the frequencies were first trained for."""
    attention_factor: float | None = None
    """Multiplies cosines and sines; None means the paper's formula."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long waves are slowed by `factor`, short ones are kept, those between are blended."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): one measured factor per frequency, a set for short and one for long contexts."""

    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float | None = None
    """None means max_position_embeddings / original_max_position_embeddings."""
    attention_factor: float | None = None


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling
"""How a checkpoint scales its rotary frequencies; the field names are those of transformers."""

SCALINGS: Mapping[str, type[RopeScaling]] = MappingProxyType(
    {
        "linear": LinearScaling,
        "dynamic": DynamicScaling,
        "yarn": YarnScaling,
        "llama3": Llama3Scaling,
        "longrope": LongRopeScaling,
    }
)
"""The scalings by their `rope_type`."""

MAY_BE_ZERO = frozenset({"attention_factor", "mscale", "mscale_all_dim"})


def parse_rope_scaling(rope_type: str, values: Mapping[str, Any]) -> RopeScaling:
    """Return the scaling that JSON values describe; whatever it does not know raises ValueError by name."""
    if rope_type not in SCALINGS:
        raise ValueError(f"rope_type={rope_type!r} is not known: it must be one of {sorted(SCALINGS)}")
    fields = {field.name: field for field in dataclasses.fields(SCALINGS[rope_type])}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"rope_type={rope_type!r} has no {unknown}: take them out")
    given: dict[str, Any] = {name: _parse_field(name, value) for name, value in values.items() if value is not None}
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if missing:
        raise ValueError(f"rope_type={rope_type!r} needs {missing}: add them to the rope parameters")
    scaling = SCALINGS[rope_type](**given)
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"high_freq_factor={scaling.high_freq_factor} must be above low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


def _parse_field(name: str, value: object) -> object:
    """Return the value in the type of its field; ValueError, by name, if it is not of that kind."""
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate={value!r} must be true or false")
        return value
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{name}={value!r} must be a list of positive numbers")
        return tuple(_parse_number(name, number) for number in value)
    number = _parse_number(name, value)
    if name != "original_max_position_embeddings":
        return number
    if number != int(number):
        raise ValueError(f"{name}={value!r} must be a whole number of tokens")
    return int(number)


def _parse_number(name: str, value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # not-a-number fails the comparison, and no integer is too large for it
    if not is_number or not (0 < value < 1e30 or (value == 0 and name in MAY_BE_ZERO)):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a positive number")
    return float(value)  # type: ignore[arg-type]


def rope_scaling_as_json(scaling: RopeScaling) -> dict[str, Any]:
    """Return the scaling as JSON values, `rope_type` among them."""
    (rope_type,) = (name for name, kind in SCALINGS.items() if kind is type(scaling))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(scaling).items()}
    return {"rope_type": rope_type} | {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class RopeTable:
    """The rotary frequencies of a model: hashable, so that a model can carry them as a fact and not as weights."""

    inverse_frequencies: tuple[float, ...]
    """One float32 value per pair of dimensions (rotary_dim / 2)."""
    attention_factor: float
    """Multiplies cosines and sines."""


def build_rope_table(
    *,
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    max_position_embeddings: int,
    max_model_len: int | None = None,
) -> RopeTable:
    """Return the frequencies for sequences of up to `max_model_len` tokens (default `max_position_embeddings`).

    `rotary_dim` is how many dimensions of a head are rotated: all of them, or the first ones.
    dynamic: frequencies of a sequence of max(max_model_len, max_position_embeddings) tokens. longrope: the long
    factors if `max_model_len` is above the original length, else the short ones.
    """
    length = max_position_embeddings if max_model_len is None else max_model_len
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    attention_factor = 1.0
    if scaling is None:
        frequencies = _inverse(theta, exponents)
    elif isinstance(scaling, LinearScaling):
        frequencies = _inverse(theta, exponents) / np.float32(scaling.factor)
    elif isinstance(scaling, DynamicScaling):
        stretched = _dynamic_theta(scaling, theta, rotary_dim, max_position_embeddings, length)
        frequencies = _inverse(stretched, exponents)
    elif isinstance(scaling, Llama3Scaling):
        frequencies = _llama3(scaling, _inverse(theta, exponents))
    elif isinstance(scaling, YarnScaling):
        frequencies = _yarn(scaling, theta, rotary_dim, exponents)
        attention_factor = _yarn_attention_factor(scaling)
    else:
        is_long = length > scaling.original_max_position_embeddings
        factors = np.array(scaling.long_factor if is_long else scaling.short_factor, np.float32)
        frequencies = np.float32(1.0) / (factors * np.power(np.float32(theta), exponents))
        attention_factor = _longrope_attention_factor(scaling, max_position_embeddings)
    return RopeTable(tuple(float(f) for f in frequencies.astype(np.float32)), float(attention_factor))


def _inverse(theta: float, exponents: np.ndarray) -> np.ndarray:
    return np.float32(1.0) / np.power(np.float32(theta), exponents)


def _dynamic_theta(scaling: DynamicScaling, theta: float, rotary_dim: int, original: int, length: int) -> float:
    """Return theta for a sequence of `length` tokens (never below the original length)."""
    stretched = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return float(theta * stretched ** (rotary_dim / (rotary_dim - 2)))


def _llama3(scaling: Llama3Scaling, frequencies: np.ndarray) -> np.ndarray:
    original, factor = scaling.original_max_position_embeddings, np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    slowed = np.where(wavelengths > np.float32(original / low), frequencies / factor, frequencies)
    blend = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - blend) * slowed / factor + blend * slowed
    is_between = ~(wavelengths < np.float32(original / high)) & ~(wavelengths > np.float32(original / low))
    return np.where(is_between, blended, slowed)


def _yarn(scaling: YarnScaling, theta: float, rotary_dim: int, exponents: np.ndarray) -> np.ndarray:
    """Return the frequencies of YaRN, section 3.2: a ramp over the dimensions from kept to slowed ones."""
    low = _turning_dimension(scaling, scaling.beta_fast or 32.0, theta, rotary_dim)
    high = _turning_dimension(scaling, scaling.beta_slow or 1.0, theta, rotary_dim)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, 0, 1)
    periods = np.power(np.float32(theta), exponents)
    slowed = np.float32(1.0) / (np.float32(scaling.factor) * periods)
    return slowed * (np.float32(1) - kept) + np.float32(1.0) / periods * kept


def _turning_dimension(scaling: YarnScaling, rotations: float, theta: float, rotary_dim: int) -> float:
    """Return the dimension whose wave turns `rotations` times within the original length."""
    turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
    return (rotary_dim * math.log(turns)) / (2 * math.log(theta))


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    steepness = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (steepness * scaling.mscale + 1.0) / (steepness * scaling.mscale_all_dim + 1.0)
    return steepness + 1.0


def _longrope_attention_factor(scaling: LongRopeScaling, max_position_embeddings: int) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    original = scaling.original_max_position_embeddings
    factor = max_position_embeddings / original if scaling.factor is None else scaling.factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


Angles = tuple[Float[Array, "tokens half_rotary_dim"], Float[Array, "tokens half_rotary_dim"]]
"""The float32 cosines and sines by which each token's heads are turned."""


def rotary_angles(positions: Int[Array, " tokens"], table: RopeTable) -> Angles:
    """Return cosines and sines of every token, attention factor included; once per step, for all layers."""
    frequencies = jnp.array(table.inverse_frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * table.attention_factor
    # the result of a scatter is not fused into its readers: else XLA's CPU loops compute each cosine anew for every
    # head of every layer (README, decision 6; an optimization_barrier is taken out too early)
    kept = jnp.zeros_like(both).at[jnp.arange(positions.shape[0])].set(both, unique_indices=True)
    cosines, sines = jnp.split(kept, 2, axis=-1)
    return cosines, sines


def rotate(
    heads: Float[Array, "tokens heads head_dim"],
    cosines: Float[Array, "tokens half_rotary_dim"],
    sines: Float[Array, "tokens half_rotary_dim"],
    *,
    is_interleaved: bool = False,
) -> Float[Array, "tokens heads head_dim"]:
    """Return the heads turned by their angles, in float32 and back.

    Dimension i is paired with i + rotary_dim / 2, or, interleaved, dimension 2i with 2i + 1. Dimensions from
    rotary_dim on, where the angles are fewer than half of head_dim, stay as they are.
    """
    rotary_dim = 2 * cosines.shape[-1]
    wide, rest = heads[..., :rotary_dim].astype(jnp.float32), heads[..., rotary_dim:]
    cosines, sines = cosines[:, None, :], sines[:, None, :]
    if is_interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned_first = first * cosines - second * sines
    turned_second = second * cosines + first * sines
    if is_interleaved:
        turned = jnp.stack([turned_first, turned_second], axis=-1).reshape(wide.shape)
    else:
        turned = jnp.concatenate([turned_first, turned_second], axis=-1)
    turned = turned.astype(heads.dtype)
    return turned if rotary_dim == heads.shape[-1] else jnp.concatenate([turned, rest], axis=-1)
