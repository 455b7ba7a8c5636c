"""GPT-2 from Hugging Face: its linear weights are [in, out], and query, key and value are one of them."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, head, linear, norm
from converters.facts import sizes
from converters.rules import TRANSPOSE, Ignore, Row, Rule, Split
from jaxpaged.models.config import ModelConfig

NAMES = {
    "model_dim": "n_embd",
    "mlp_dim": "n_inner",
    "num_layers": "n_layer",
    "num_q_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "activation_function",
    "eos_token_ids": "eos_token_id",
}
WITHOUT_EFFECT = (
    "n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
)
"""Of GPT-2 and GPT-J."""

PARTS = ("query", "key", "value")
LAYER = "transformer.h.{i}"


def rules(config: ModelConfig) -> tuple[Row, ...]:
    kernels, biases = (tuple(f"layers.{{i}}.attention.{part}.{kind}" for part in PARTS) for kind in ("kernel", "bias"))
    return (
        Rule("transformer.wte.weight", "embedding.table"),
        Rule("transformer.wpe.weight", "positions.table"),
        Split(f"{LAYER}.attn.c_attn.weight", kernels, TRANSPOSE, axis=1),
        Split(f"{LAYER}.attn.c_attn.bias", biases),
        *linear(f"{LAYER}.attn.c_proj", "layers.{i}.attention.output", TRANSPOSE),
        *linear(f"{LAYER}.mlp.c_fc", "layers.{i}.mlp.up", TRANSPOSE),
        *linear(f"{LAYER}.mlp.c_proj", "layers.{i}.mlp.down", TRANSPOSE),
        *norm(f"{LAYER}.ln_1", "layers.{i}.attention_norm"),
        *norm(f"{LAYER}.ln_2", "layers.{i}.mlp_norm"),
        *norm("transformer.ln_f", "norm"),
        *head(config, "transformer.wte.weight"),
        Ignore(f"{LAYER}.attn.bias", because="a mask, which attention makes itself"),
        Ignore(f"{LAYER}.attn.masked_bias", because="a constant of the mask"),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("scale_attn_weights", True)
    reader.only("scale_attn_by_inverse_layer_idx", False)
    # an order of float32 operations that is always ours
    reader.ignore("reorder_and_upcast_attn", *WITHOUT_EFFECT)
    return sizes(
        reader, NAMES, mlp_dim=4 * reader.whole_number("n_embd"), ties_embeddings=True, norm_eps=1e-5,
        activation="gelu_new", max_position_embeddings=1024,
    ) | {"attention_bias": True, "mlp_bias": True}


CONVERSION = Conversion(
    architecture="GPT2LMHeadModel", model_type="gpt2", facts=facts, rules=rules, names=NAMES,
    optional_prefix="transformer.",
)
