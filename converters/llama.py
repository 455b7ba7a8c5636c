"""Llama 1, 2 and 3.x from Hugging Face, and what most of its descendants share: names of weights."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, head, linear, norm
from converters.facts import rope, sizes
from converters.rules import Ignore, Row, Rule
from jaxpaged.models.config import ModelConfig

ATTENTION = (
    *linear("model.layers.{i}.self_attn.q_proj", "layers.{i}.attention.query"),
    *linear("model.layers.{i}.self_attn.k_proj", "layers.{i}.attention.key"),
    *linear("model.layers.{i}.self_attn.v_proj", "layers.{i}.attention.value"),
    *linear("model.layers.{i}.self_attn.o_proj", "layers.{i}.attention.output"),
)
HEAD_NORMS = (
    *norm("model.layers.{i}.self_attn.q_norm", "layers.{i}.attention.query_norm"),
    *norm("model.layers.{i}.self_attn.k_norm", "layers.{i}.attention.key_norm"),
)
GATED_MLP = (
    *linear("model.layers.{i}.mlp.gate_proj", "layers.{i}.mlp.gate"),
    *linear("model.layers.{i}.mlp.up_proj", "layers.{i}.mlp.up"),
    *linear("model.layers.{i}.mlp.down_proj", "layers.{i}.mlp.down"),
)
PRE_NORMS = (
    *norm("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
    *norm("model.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
)


def ends(config: ModelConfig) -> tuple[Row, ...]:
    """Return the rows of what stands before and behind the layers, and of buffers that old files hold."""
    return (
        Rule("model.embed_tokens.weight", "embedding.table"),
        *norm("model.norm", "norm"),
        *head(config, "model.embed_tokens.weight"),
        Ignore("model.layers.{i}.self_attn.rotary_emb.inv_freq", because="recomputed from rope_theta"),
        Ignore("model.rotary_emb.inv_freq", because="recomputed from rope_theta"),
    )


def rules(config: ModelConfig, norms: tuple[Row, ...] = PRE_NORMS) -> tuple[Row, ...]:
    """Return the rows of a Llama, or of one whose layers have their norms elsewhere: `norms` names those."""
    return (*ATTENTION, *HEAD_NORMS, *GATED_MLP, *norms, *ends(config))


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("sliding_window")
    reader.only("layer_types")
    shape = sizes(reader)
    return shape | rope(reader, shape) | {
        "attention_bias": reader.get("attention_bias", False),
        "mlp_bias": reader.get("mlp_bias", False),
    }


CONVERSION = Conversion(architecture="LlamaForCausalLM", model_type="llama", facts=facts, rules=rules)
