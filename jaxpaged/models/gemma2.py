"""Gemma 2: a Gemma with norms behind attention and MLP too, soft caps, and windows in every other layer."""

from dataclasses import dataclass
from typing import Any

from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.gemma import gemma_embedding, gemma_norm
from jaxpaged.models.parts import attention, equal_ropes, gated_mlp


@dataclass(frozen=True, kw_only=True)
class Gemma2Extras:
    """What a Gemma 2 has alone."""

    query_pre_attn_scalar: float
    """Scores are divided by its root, in place of that of head_dim."""
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        check_positive(
            query_pre_attn_scalar=self.query_pre_attn_scalar,
            attention_soft_cap=self.attention_soft_cap,
            logit_soft_cap=self.logit_soft_cap,
        )


def check_positive(**numbers: float | None) -> None:
    """Raise ValueError, by name, for a number that is there and not above 0."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name}={number!r} must be a positive number")


def sandwich_layer(config: ModelConfig, layer: int, **different: Any) -> DecoderLayer:
    """Return a layer with norms before and behind; `different` are arguments of `Attention`."""
    return DecoderLayer(
        attention=attention(config, layer, **different),
        mlp=gated_mlp(config),
        attention_norm=gemma_norm(config),
        mlp_norm=gemma_norm(config),
        attention_output_norm=gemma_norm(config),
        mlp_output_norm=gemma_norm(config),
    )


def gemma2(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    extras: Gemma2Extras = config.extras
    layers = [
        sandwich_layer(
            config, layer, scale=extras.query_pre_attn_scalar**-0.5, soft_cap=extras.attention_soft_cap
        )
        for layer in range(config.num_layers)
    ]
    return Decoder(
        config,
        layers,
        norm=gemma_norm(config),
        ropes=equal_ropes(config, max_model_len),
        embedding=gemma_embedding(config),
        logit_soft_cap=extras.logit_soft_cap,
    )
