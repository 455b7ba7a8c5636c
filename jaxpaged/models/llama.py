"""Llama 1, 2 and 3.x, and whatever shares their graph: what differs between those is facts of the config."""

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, pre_norm_decoder


def llama(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder: RMS norms before attention and gated MLP, rotary positions, windows where there are any.

    Only length-dependent rope scalings read `max_model_len`, the most tokens a sequence will have.
    """
    attentions = [attention(config, layer) for layer in range(config.num_layers)]
    return pre_norm_decoder(config, attentions, ropes=equal_ropes(config, max_model_len))
