"""OPT (and Galactica) from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, head, linear, norm
from converters.facts import LLAMA_NAMES, sizes
from converters.rules import Row, Rule
from jaxpaged.models.config import ModelConfig

NAMES = {
    **{ours: theirs for ours, theirs in LLAMA_NAMES.items() if ours not in ("num_kv_heads", "norm_eps")},
    "mlp_dim": "ffn_dim",
    "activation": "activation_function",
    "embedding_dim": "word_embed_proj_dim",
    "is_norm_before": "do_layer_norm_before",
    "is_norm_affine": "layer_norm_elementwise_affine",
    "attention_bias": "enable_bias",
    "mlp_bias": "enable_bias",
}

DECODER = "model.decoder"
LAYER = f"{DECODER}.layers.{{i}}"


def rules(config: ModelConfig) -> tuple[Row, ...]:
    return (
        Rule(f"{DECODER}.embed_tokens.weight", "embedding.table"),
        Rule(f"{DECODER}.embed_positions.weight", "positions.table"),
        *linear(f"{DECODER}.project_in", "embedding.inward"),
        *linear(f"{DECODER}.project_out", "embedding.outward"),
        *linear(f"{LAYER}.self_attn.q_proj", "layers.{i}.attention.query"),
        *linear(f"{LAYER}.self_attn.k_proj", "layers.{i}.attention.key"),
        *linear(f"{LAYER}.self_attn.v_proj", "layers.{i}.attention.value"),
        *linear(f"{LAYER}.self_attn.out_proj", "layers.{i}.attention.output"),
        *linear(f"{LAYER}.fc1", "layers.{i}.mlp.up"),
        *linear(f"{LAYER}.fc2", "layers.{i}.mlp.down"),
        *norm(f"{LAYER}.self_attn_layer_norm", "layers.{i}.attention_norm"),
        *norm(f"{LAYER}.final_layer_norm", "layers.{i}.mlp_norm"),
        *norm(f"{DECODER}.final_layer_norm", "norm"),
        *head(config, f"{DECODER}.embed_tokens.weight"),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.ignore("dropout", "layerdrop", "activation_dropout", "init_std")
    shape = sizes(reader, NAMES, ties_embeddings=True, norm_eps=1e-5, activation="relu")
    embedding_dim = reader.get("word_embed_proj_dim", shape["model_dim"])
    if embedding_dim != shape["model_dim"] and not shape["tie_embeddings"]:
        raise ValueError(
            f"word_embed_proj_dim={embedding_dim} other than hidden_size={shape['model_dim']} is supported only with "
            "tie_word_embeddings=True, as it was published"
        )
    is_norm_before = reader.flag("do_layer_norm_before", True)
    use_bias = reader.get("enable_bias", True)
    return shape | {
        "attention_bias": use_bias,
        "mlp_bias": use_bias,
        "extras": {
            "embedding_dim": embedding_dim,
            "is_norm_before": is_norm_before,
            "has_final_norm": not reader.flag("_remove_final_layer_norm", False) and is_norm_before,
            "is_norm_affine": reader.get("layer_norm_elementwise_affine", True),
        },
    }


def values(config: ModelConfig) -> dict[str, Any]:
    return {"_remove_final_layer_norm": config.extras.is_norm_before and not config.extras.has_final_norm}


CONVERSION = Conversion(
    architecture="OPTForCausalLM", model_type="opt", facts=facts, rules=rules, names=NAMES,
    values=values, optional_prefix="model.",
)
