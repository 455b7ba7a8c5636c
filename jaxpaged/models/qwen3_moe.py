"""Qwen 3, mixtures: a Qwen 3 whose MLPs are mixtures of experts, in all layers or some."""

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import equal_ropes, mixed_mlps, pre_norm_decoder
from jaxpaged.models.qwen3 import qwen3_attentions


def qwen3_moe(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    return pre_norm_decoder(
        config, qwen3_attentions(config), mlps=mixed_mlps(config), ropes=equal_ropes(config, max_model_len)
    )
