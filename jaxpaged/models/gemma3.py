"""Gemma 3, text: layers as in Gemma 2 without a cap of scores, query and key norms, another rope in windowed layers."""

from dataclasses import dataclass

from jaxpaged.layers.rope import RopeScaling
from jaxpaged.models.config import ModelConfig, check_rope_scaling
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.gemma import gemma_embedding, gemma_norm
from jaxpaged.models.gemma2 import check_positive, sandwich_layer
from jaxpaged.models.parts import rope_table, rope_table_of


@dataclass(frozen=True, kw_only=True)
class Gemma3Extras:
    """What a Gemma 3 has alone."""

    query_pre_attn_scalar: float
    """Scores are divided by its root, in place of that of head_dim."""
    window_rope_theta: float
    """Of the layers that have a window; the config's own is that of the others."""
    window_rope_scaling: RopeScaling | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        check_positive(
            query_pre_attn_scalar=self.query_pre_attn_scalar,
            window_rope_theta=self.window_rope_theta,
            logit_soft_cap=self.logit_soft_cap,
        )


def gemma3(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    extras: Gemma3Extras = config.extras
    check_rope_scaling(extras.window_rope_scaling, config.head_dim)
    layers = [
        sandwich_layer(
            config,
            layer,
            scale=extras.query_pre_attn_scalar**-0.5,
            query_norm=gemma_norm(config, config.head_dim),
            key_norm=gemma_norm(config, config.head_dim),
        )
        for layer in range(config.num_layers)
    ]
    whole = rope_table(config, max_model_len)
    windowed = rope_table_of(config, extras.window_rope_theta, extras.window_rope_scaling, max_model_len)
    return Decoder(
        config,
        layers,
        norm=gemma_norm(config),
        ropes=[whole if config.window_of(layer) is None else windowed for layer in range(config.num_layers)],
        embedding=gemma_embedding(config),
        logit_soft_cap=extras.logit_soft_cap,
    )
