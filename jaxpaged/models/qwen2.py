"""Qwen 2 and 2.5: a Llama whose query, key and value have biases, and whose output projection has none."""

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, pre_norm_decoder


def qwen2(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    attentions = [
        attention(config, layer, use_bias=True, use_output_bias=False) for layer in range(config.num_layers)
    ]
    return pre_norm_decoder(config, attentions, ropes=equal_ropes(config, max_model_len))
