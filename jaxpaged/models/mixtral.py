"""Mixtral: a Mistral whose MLPs are mixtures of experts."""

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, mixed_mlps, pre_norm_decoder


def mixtral(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    attentions = [attention(config, layer) for layer in range(config.num_layers)]
    return pre_norm_decoder(config, attentions, mlps=mixed_mlps(config), ropes=equal_ropes(config, max_model_len))
