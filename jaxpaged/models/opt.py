"""OPT, every shape: learned positions from row 2 on, layer norms before (or, at 350M, behind) attention and MLP."""

from dataclasses import dataclass

from jaxpaged.layers.decoder_layer import DecoderLayer, PostNormLayer
from jaxpaged.layers.embedding import LearnedPositions, ProjectedEmbedding
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parts import attention, layer_norm, plain_mlp

POSITION_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class OPTExtras:
    """What an OPT has alone."""

    embedding_dim: int
    """Width of the embedding table; where it is not model_dim, there is a projection inward and one outward."""
    is_norm_before: bool
    """Norms stand before attention and MLP, and one at the end; else they normalise each sum, and there is none."""
    has_final_norm: bool
    is_norm_affine: bool
    """Norms have scale and bias."""

    def __post_init__(self) -> None:
        if not 1 <= self.embedding_dim <= 2**20:
            raise ValueError(f"embedding_dim={self.embedding_dim} must be a whole number from 1 to {2**20}")


def opt(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the decoder; nothing of it depends on `max_model_len`."""
    extras: OPTExtras = config.extras
    is_affine = extras.is_norm_affine
    kind = DecoderLayer if extras.is_norm_before else PostNormLayer
    layers = [
        kind(
            attention=attention(config, layer),
            mlp=plain_mlp(config),
            attention_norm=layer_norm(config, is_affine=is_affine),
            mlp_norm=layer_norm(config, is_affine=is_affine),
        )
        for layer in range(config.num_layers)
    ]
    embedding = None
    if extras.embedding_dim != config.model_dim:
        embedding = ProjectedEmbedding(
            config.vocab_size, extras.embedding_dim, config.model_dim, dtype=config.dtype
        )
    return Decoder(
        config,
        layers,
        norm=layer_norm(config, is_affine=is_affine) if extras.has_final_norm else None,
        embedding=embedding,
        positions=LearnedPositions(
            config.max_position_embeddings, config.model_dim, offset=POSITION_OFFSET, dtype=config.dtype
        ),
    )
