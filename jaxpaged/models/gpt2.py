"""GPT-2: learned positions, layer norms, biases, a plain MLP."""

from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.layers.embedding import LearnedPositions
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, layer_norm, plain_mlp


def gpt2(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder; nothing of it depends on `max_model_len`."""
    layers = [
        DecoderLayer(
            attention=attention(config, layer),
            mlp=plain_mlp(config),
            attention_norm=layer_norm(config),
            mlp_norm=layer_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    positions = LearnedPositions(config.max_position_embeddings, config.model_dim, offset=0, dtype=config.dtype)
    return Decoder(config, layers, norm=layer_norm(config), positions=positions)
