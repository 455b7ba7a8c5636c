"""StarCoder 2: layer norms, biases and a plain MLP around a Llama's attention, in a window where the config has one."""

from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, layer_norm, plain_mlp


def starcoder2(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    layers = [
        DecoderLayer(
            attention=attention(config, layer),
            mlp=plain_mlp(config),
            attention_norm=layer_norm(config),
            mlp_norm=layer_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    return Decoder(config, layers, norm=layer_norm(config), ropes=equal_ropes(config, max_model_len))
