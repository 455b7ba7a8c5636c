"""Phi 3, 3.5 and 4 (but the mixtures) from Hugging Face: a Llama with fused weights, part of each head rotated."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion
from converters.facts import equal_windows, rope, sizes
from converters.llama import ATTENTION, GATED_MLP, PRE_NORMS, ends
from converters.rules import Row, Split
from jaxpaged.models.config import ModelConfig

LAYER = "layers.{i}"
FUSED = (
    Split(
        "model.layers.{i}.self_attn.qkv_proj.weight",
        tuple(f"{LAYER}.attention.{name}.kernel" for name in ("query", "key", "value")),
    ),
    Split("model.layers.{i}.mlp.gate_up_proj.weight", (f"{LAYER}.mlp.gate.kernel", f"{LAYER}.mlp.up.kernel")),
)


def rules(config: ModelConfig) -> tuple[Row, ...]:
    whole = [row for row in (*ATTENTION, *GATED_MLP) if ".o_proj." in row.source or ".down_proj." in row.source]
    return (*FUSED, *whole, *PRE_NORMS, *ends(config))


def facts(reader: ConfigReader) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.only(name, False)
    reader.only("full_attn_mod", 1)
    reader.only("interpolate_factor", 1)
    reader.ignore("resid_pdrop", "embd_pdrop")
    shape = sizes(reader, norm_eps=1e-5, max_position_embeddings=4096)
    early_names = {"su": "longrope", "yarn": "longrope"}
    positions = rope(reader, shape, rotary_factor=1.0, type_aliases=early_names, original_length=4096)
    return shape | positions | {"windows": equal_windows(reader.get("sliding_window"), shape["num_layers"])}


def values(config: ModelConfig) -> dict[str, Any]:
    return {"pad_token_id": None}  # the one that transformers assumes may be no token of this vocabulary


CONVERSION = Conversion(architecture="Phi3ForCausalLM", model_type="phi3", facts=facts, rules=rules, values=values)
