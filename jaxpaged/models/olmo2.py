"""OLMo 2: norms behind attention and MLP and none before, and norms of whole queries and keys."""

from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, gated_mlp, norms_of_all_heads, rms_norm


def olmo2(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    layers = [
        DecoderLayer(
            attention=attention(config, layer, **norms_of_all_heads(config)),
            mlp=gated_mlp(config),
            attention_norm=None,
            mlp_norm=None,
            attention_output_norm=rms_norm(config),
            mlp_output_norm=rms_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    return Decoder(config, layers, norm=rms_norm(config), ropes=equal_ropes(config, max_model_len))
