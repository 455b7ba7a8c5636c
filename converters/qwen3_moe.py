"""Qwen 3, mixtures, from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, linear
from converters.facts import LLAMA_NAMES, equal_windows, rope, sizes
from converters.llama import ATTENTION, GATED_MLP, HEAD_NORMS, PRE_NORMS, ends
from converters.mixtral import stacks
from converters.rules import Row
from jaxpaged.models.config import ModelConfig

NAMES = {
    **LLAMA_NAMES,
    "num_experts_per_token": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "normalises_weights": "norm_topk_prob",
    "dense_layers": "mlp_only_layers",
}


def rules(config: ModelConfig) -> tuple[Row, ...]:
    return (
        *ATTENTION,
        *HEAD_NORMS,
        *linear("model.layers.{i}.mlp.gate", "layers.{i}.mlp.router"),
        *stacks("model.layers.{i}.mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
        *GATED_MLP,
        *PRE_NORMS,
        *ends(config),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.ignore("output_router_logits", "router_aux_loss_coef", "max_window_layers")
    shape = sizes(reader, max_position_embeddings=32_768)
    own_window = reader.get_or_null("sliding_window", 4096)
    window = own_window if reader.flag("use_sliding_window", False) else None
    period = reader.whole_number("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers")
    layers = range(shape["num_layers"])
    # recent code writes num_local_experts for what all published files call num_experts
    num_experts = reader.get("num_experts", reader.get("num_local_experts", 128))
    return shape | rope(reader, shape) | {
        "attention_bias": reader.get("attention_bias", False),
        "windows": equal_windows(window, shape["num_layers"]),
        "experts": {
            "num_experts": num_experts,
            "num_experts_per_token": reader.get("num_experts_per_tok", 8),
            "expert_dim": reader.required("moe_intermediate_size"),
            "normalises_weights": reader.get("norm_topk_prob", False),
            "dense_layers": [layer for layer in layers if layer in dense or (layer + 1) % period],
        },
    }


def values(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        "num_experts": config.experts.num_experts,
        "num_experts_per_tok": config.experts.num_experts_per_token,
        "moe_intermediate_size": config.experts.expert_dim,
        "norm_topk_prob": config.experts.normalises_weights,
        "mlp_only_layers": list(config.experts.dense_layers),
        "use_sliding_window": config.windows is not None,
    }


CONVERSION = Conversion(
    architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", facts=facts, rules=rules, names=NAMES, values=values
)
