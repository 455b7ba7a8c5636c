"""GPT-NeoX and Pythia from Hugging Face: query, key and value lie side by side head by head."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, head, linear, norm
from converters.facts import LLAMA_NAMES, rope, sizes
from converters.rules import Ignore, Row, Rule, Split
from jaxpaged.models.config import ModelConfig

NAMES = {
    **LLAMA_NAMES,
    "norm_eps": "layer_norm_eps",
    "rope_theta": "rotary_emb_base",
    "rotary_dim": "rotary_pct",
    "has_parallel_residual": "use_parallel_residual",
}

LAYER = "gpt_neox.layers.{i}"


def rules(config: ModelConfig) -> tuple[Row, ...]:
    fused = (
        Split(
            f"{LAYER}.attention.query_key_value.{theirs}",
            tuple(f"layers.{{i}}.attention.{part}.{ours}" for part in ("query", "key", "value")),
            num_groups=config.num_q_heads,
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    )
    return (
        Rule("gpt_neox.embed_in.weight", "embedding.table"),
        *fused,
        *linear(f"{LAYER}.attention.dense", "layers.{i}.attention.output"),
        *linear(f"{LAYER}.mlp.dense_h_to_4h", "layers.{i}.mlp.up"),
        *linear(f"{LAYER}.mlp.dense_4h_to_h", "layers.{i}.mlp.down"),
        *norm(f"{LAYER}.input_layernorm", "layers.{i}.attention_norm"),
        *norm(f"{LAYER}.post_attention_layernorm", "layers.{i}.mlp_norm"),
        *norm("gpt_neox.final_layer_norm", "norm"),
        # embed_out is the name that files have, lm_head what recent code calls it
        *head(config, "gpt_neox.embed_in.weight", "embed_out"),
        *head(config, "gpt_neox.embed_in.weight", "lm_head"),
        Ignore(f"{LAYER}.attention.bias", because="a mask, which attention makes itself"),
        Ignore(f"{LAYER}.attention.masked_bias", because="a constant of the mask"),
        Ignore(f"{LAYER}.attention.rotary_emb.inv_freq", because="recomputed from rotary_emb_base"),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.ignore(
        "hidden_dropout", "classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"
    )
    shape = sizes(reader, NAMES | {"num_kv_heads": "num_attention_heads"}, norm_eps=1e-5, activation="gelu")
    positions = rope(
        reader, shape, theta_name="rotary_emb_base", rotary_factor=0.25, rotary_factor_name="rotary_pct"
    )
    return shape | positions | {
        "attention_bias": reader.get("attention_bias", True),
        "mlp_bias": True,
        "extras": {"has_parallel_residual": reader.get("use_parallel_residual", True)},
    }


CONVERSION = Conversion(
    architecture="GPTNeoXForCausalLM", model_type="gpt_neox", facts=facts, rules=rules, names=NAMES
)
