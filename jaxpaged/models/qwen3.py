"""Qwen 3: a Llama that normalises each head of its queries and keys before it rotates them."""

from jaxpaged.layers.attention import Attention
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, pre_norm_decoder, rms_norm


def qwen3_attentions(config: ModelConfig) -> list[Attention]:
    """Return the attention of each layer."""
    dim = config.head_dim
    return [
        attention(config, layer, query_norm=rms_norm(config, dim), key_norm=rms_norm(config, dim))
        for layer in range(config.num_layers)
    ]


def qwen3(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    return pre_norm_decoder(config, qwen3_attentions(config), ropes=equal_ropes(config, max_model_len))
