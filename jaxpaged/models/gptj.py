"""GPT-J: attention and MLP side by side behind one layer norm, neighbouring dimensions rotated together."""

from jaxpaged.layers.decoder_layer import ParallelLayer
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, layer_norm, plain_mlp


def gptj(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    layers = [
        ParallelLayer(
            attention=attention(config, layer, is_interleaved=True),
            mlp=plain_mlp(config),
            attention_norm=layer_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    ropes = equal_ropes(config, max_model_len)
    return Decoder(config, layers, norm=layer_norm(config), ropes=ropes, use_head_bias=True)
