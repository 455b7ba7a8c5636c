"""Mixtral from Hugging Face: each expert's weights are tensors of their own."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, linear
from converters.facts import LLAMA_NAMES, equal_windows, rope, sizes
from converters.llama import ATTENTION, PRE_NORMS, ends
from converters.rules import Row, Stack
from jaxpaged.models.config import ModelConfig

NAMES = {
    **LLAMA_NAMES,
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "expert_dim": "intermediate_size",
}

MOE = "model.layers.{i}.block_sparse_moe"


def stacks(experts: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Return the rows of a mixture's experts, by what their three weights are called."""
    return tuple(
        Stack(f"{experts}.{{e}}.{theirs}.weight", f"layers.{{i}}.mlp.experts.{ours}")
        for theirs, ours in ((gate, "gate"), (up, "up"), (down, "down"))
    )


def rules(config: ModelConfig) -> tuple[Row, ...]:
    return (
        *ATTENTION,
        *linear(f"{MOE}.gate", "layers.{i}.mlp.router"),
        *stacks(f"{MOE}.experts", gate="w1", up="w3", down="w2"),
        *PRE_NORMS,
        *ends(config),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    shape = sizes(reader, norm_eps=1e-5, max_position_embeddings=131_072)
    return shape | rope(reader, shape, theta=1_000_000.0) | {
        "windows": equal_windows(reader.get("sliding_window"), shape["num_layers"]),
        "experts": {
            "num_experts": reader.get("num_local_experts", 8),
            "num_experts_per_token": reader.get("num_experts_per_tok", 2),
            "expert_dim": shape["mlp_dim"],
            "normalises_weights": True,
        },
    }


def values(config: ModelConfig) -> dict[str, Any]:
    assert config.experts is not None
    return {
        "num_local_experts": config.experts.num_experts,
        "num_experts_per_tok": config.experts.num_experts_per_token,
    }


CONVERSION = Conversion(
    architecture="MixtralForCausalLM", model_type="mixtral", facts=facts, rules=rules, names=NAMES, values=values
)
