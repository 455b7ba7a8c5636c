"""SmolLM 3: a Llama some of whose layers rotate nothing."""

from dataclasses import dataclass

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, pre_norm_decoder, rope_table


@dataclass(frozen=True, kw_only=True)
class SmolLM3Extras:
    """What a SmolLM 3 has alone."""

    unrotated_layers: tuple[int, ...]
    """Layers whose queries and keys know no positions, counted from 0."""


def smollm3(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    extras: SmolLM3Extras = config.extras
    rope = rope_table(config, max_model_len)
    layers = range(config.num_layers)
    return pre_norm_decoder(
        config,
        [attention(config, layer) for layer in layers],
        ropes=[None if layer in extras.unrotated_layers else rope for layer in layers],
    )
