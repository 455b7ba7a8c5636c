"""GPT-J from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, head, linear, norm
from converters.facts import sizes
from converters.gpt2 import LAYER, NAMES, WITHOUT_EFFECT
from converters.rules import Ignore, Row, Rule
from jaxpaged.models.config import ModelConfig


def rules(config: ModelConfig) -> tuple[Row, ...]:
    return (
        Rule("transformer.wte.weight", "embedding.table"),
        *linear(f"{LAYER}.attn.q_proj", "layers.{i}.attention.query"),
        *linear(f"{LAYER}.attn.k_proj", "layers.{i}.attention.key"),
        *linear(f"{LAYER}.attn.v_proj", "layers.{i}.attention.value"),
        *linear(f"{LAYER}.attn.out_proj", "layers.{i}.attention.output"),
        *linear(f"{LAYER}.mlp.fc_in", "layers.{i}.mlp.up"),
        *linear(f"{LAYER}.mlp.fc_out", "layers.{i}.mlp.down"),
        *norm(f"{LAYER}.ln_1", "layers.{i}.attention_norm"),
        *norm("transformer.ln_f", "norm"),
        *head(config, "transformer.wte.weight"),
        Ignore(f"{LAYER}.attn.bias", because="a mask, which attention makes itself"),
        Ignore(f"{LAYER}.attn.masked_bias", because="a constant of the mask"),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    reader.only("scale_attn_weights", True)
    reader.only("rotary", True)
    reader.only("tie_word_embeddings", False)  # the head has a bias
    reader.ignore(*WITHOUT_EFFECT)
    shape = sizes(
        reader, NAMES, mlp_dim=4 * reader.whole_number("n_embd"), norm_eps=1e-5, activation="gelu_new",
        max_position_embeddings=2048,
    )
    rotary_dim = reader.get_or_null("rotary_dim", 64)
    if rotary_dim is None:
        raise ValueError("rotary_dim=None is not supported: it must be how many dimensions of a head are rotated")
    return shape | {"rope_theta": 10_000.0, "rotary_dim": rotary_dim, "mlp_bias": True}


CONVERSION = Conversion(architecture="GPTJForCausalLM", model_type="gptj", facts=facts, rules=rules, names=NAMES)
