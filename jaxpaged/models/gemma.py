"""Gemma: a Llama whose norms hold the difference from 1, and whose embeddings are scaled by the root of model_dim."""

from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.layers.embedding import Embedding
from jaxpaged.layers.norm import RMSNorm
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, gated_mlp, rms_norm


def gemma_norm(config: ModelConfig, dim: int | None = None) -> RMSNorm:
    return rms_norm(config, dim, offset=1.0)


def gemma_embedding(config: ModelConfig) -> Embedding:
    return Embedding(config.vocab_size, config.model_dim, scale=config.model_dim**0.5, dtype=config.dtype)


def gemma(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    layers = [
        DecoderLayer(
            attention=attention(config, layer),
            mlp=gated_mlp(config),
            attention_norm=gemma_norm(config),
            mlp_norm=gemma_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    return Decoder(
        config,
        layers,
        norm=gemma_norm(config),
        ropes=equal_ropes(config, max_model_len),
        embedding=gemma_embedding(config),
    )
