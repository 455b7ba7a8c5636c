"""GPT-NeoX and Pythia: attention and MLP side by side, each behind a layer norm, part of each head rotated."""

from dataclasses import dataclass

from jaxpaged.layers.decoder_layer import DecoderLayer, ParallelLayer
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, equal_ropes, layer_norm, plain_mlp


@dataclass(frozen=True, kw_only=True)
class GPTNeoXExtras:
    """What a GPT-NeoX has alone."""

    has_parallel_residual: bool
    """The MLP reads what attention reads; otherwise what attention gave, as elsewhere."""


def gpt_neox(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder, for sequences of up to `max_model_len` tokens."""
    extras: GPTNeoXExtras = config.extras
    kind = ParallelLayer if extras.has_parallel_residual else DecoderLayer
    layers = [
        kind(
            attention=attention(config, layer),
            mlp=plain_mlp(config),
            attention_norm=layer_norm(config),
            mlp_norm=layer_norm(config),
        )
        for layer in range(config.num_layers)
    ]
    return Decoder(config, layers, norm=layer_norm(config), ropes=equal_ropes(config, max_model_len))
