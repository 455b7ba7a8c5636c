"""The parts that architectures share, in the sizes of a config; what is different is named where it is different."""

from collections.abc import Sequence
from typing import Any

from jaxpaged.layers.attention import Attention
from jaxpaged.layers.decoder_layer import DecoderLayer
from jaxpaged.layers.mlp import MLP, GatedMLP
from jaxpaged.layers.moe import SparseMLP
from jaxpaged.layers.norm import LayerNorm, RMSNorm
from jaxpaged.layers.rope import RopeScaling, RopeTable, build_rope_table
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder


def attention(config: ModelConfig, layer: int, **different: Any) -> Attention:
    """Return the attention of a layer, in its window; `different` are arguments of `Attention`."""
    usual = {
        "num_q_heads": config.num_q_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "use_bias": config.attention_bias,
        "window": config.window_of(layer),
        "dtype": config.dtype,
    }
    return Attention(config.model_dim, **(usual | different))


def gated_mlp(config: ModelConfig) -> GatedMLP:
    return GatedMLP(
        config.model_dim, config.mlp_dim, activation=config.activation, use_bias=config.mlp_bias, dtype=config.dtype
    )


def sparse_mlp(config: ModelConfig) -> SparseMLP:
    if config.experts is None:
        raise ValueError(f"experts is missing: {config.architecture} is a mixture")
    return SparseMLP(
        config.model_dim,
        config.experts.expert_dim,
        num_experts=config.experts.num_experts,
        num_experts_per_token=config.experts.num_experts_per_token,
        normalises_weights=config.experts.normalises_weights,
        activation=config.activation,
        dtype=config.dtype,
    )


def mixed_mlps(config: ModelConfig) -> list[GatedMLP | SparseMLP]:
    """Return the MLP of each layer: a mixture, or in the config's dense layers a gated one."""
    dense_layers = () if config.experts is None else config.experts.dense_layers
    return [
        gated_mlp(config) if layer in dense_layers else sparse_mlp(config) for layer in range(config.num_layers)
    ]


def plain_mlp(config: ModelConfig) -> MLP:
    return MLP(
        config.model_dim, config.mlp_dim, activation=config.activation, use_bias=config.mlp_bias, dtype=config.dtype
    )


def rms_norm(
    config: ModelConfig, dim: int | None = None, *, offset: float = 0.0, axis: str | None = None
) -> RMSNorm:
    """Return a norm of `dim` dimensions, model_dim by default; `axis` names them where they are those of all heads."""
    dim = config.model_dim if dim is None else dim
    return RMSNorm(dim, eps=config.norm_eps, dtype=config.dtype, offset=offset, axis=axis)


def norms_of_all_heads(config: ModelConfig) -> dict[str, RMSNorm]:
    """Return norms of whole queries and keys, each over all heads together, as arguments of `attention`."""
    return {
        "query_norm": rms_norm(config, config.num_q_heads * config.head_dim, axis="q_heads"),
        "key_norm": rms_norm(config, config.num_kv_heads * config.head_dim, axis="kv_heads"),
    }


def layer_norm(config: ModelConfig, *, is_affine: bool = True) -> LayerNorm:
    return LayerNorm(config.model_dim, eps=config.norm_eps, dtype=config.dtype, is_affine=is_affine)


def rope_table(config: ModelConfig, max_model_len: int | None) -> RopeTable:
    """Return the rotary frequencies for sequences of up to `max_model_len` tokens."""
    if config.rope_theta is None:
        raise ValueError(f"rope_theta is missing: {config.architecture} rotates by position")
    return rope_table_of(config, config.rope_theta, config.rope_scaling, max_model_len)


def rope_table_of(
    config: ModelConfig, theta: float, scaling: RopeScaling | None, max_model_len: int | None
) -> RopeTable:
    """Return the same for another theta and scaling than the config's own."""
    return build_rope_table(
        rotary_dim=config.head_dim if config.rotary_dim is None else config.rotary_dim,
        theta=theta,
        scaling=scaling,
        max_position_embeddings=config.max_position_embeddings,
        max_model_len=max_model_len,
    )


def equal_ropes(config: ModelConfig, max_model_len: int | None) -> tuple[RopeTable, ...]:
    """Return the config's rotary frequencies for each layer."""
    return (rope_table(config, max_model_len),) * config.num_layers


def pre_norm_decoder(
    config: ModelConfig,
    attentions: Sequence[Attention],
    *,
    ropes: Sequence[RopeTable | None],
    mlps: Sequence[Any] | None = None,
) -> Decoder:
    """Return the decoder most models are: RMS norms before attention and MLP and at the end.

    The MLPs are gated ones if none are given.
    """
    layers = [
        DecoderLayer(
            attention=attention_of_layer,
            mlp=gated_mlp(config) if mlps is None else mlps[layer],
            attention_norm=rms_norm(config),
            mlp_norm=rms_norm(config),
        )
        for layer, attention_of_layer in enumerate(attentions)
    ]
    return Decoder(config, layers, norm=rms_norm(config), ropes=ropes)
