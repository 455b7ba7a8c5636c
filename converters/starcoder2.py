"""StarCoder 2 from Hugging Face."""

from typing import Any

from converters.config_reader import ConfigReader
from converters.conversion import Conversion, linear
from converters.facts import LLAMA_NAMES, equal_windows, rope, sizes
from converters.llama import ATTENTION, PRE_NORMS, ends
from converters.rules import Row
from jaxpaged.models.config import ModelConfig

NAMES = {**LLAMA_NAMES, "norm_eps": "norm_epsilon", "attention_bias": "use_bias", "mlp_bias": "use_bias"}


def rules(config: ModelConfig) -> tuple[Row, ...]:
    return (
        *ATTENTION,
        *linear("model.layers.{i}.mlp.c_fc", "layers.{i}.mlp.up"),
        *linear("model.layers.{i}.mlp.c_proj", "layers.{i}.mlp.down"),
        *PRE_NORMS,
        *ends(config),
    )


def facts(reader: ConfigReader) -> dict[str, Any]:
    # left in the published files by the code they were trained with, and not read by transformers
    reader.only("mlp_type", "default")
    reader.only("norm_type", "layer_norm")
    reader.only("scale_attn_weights", True)
    reader.ignore(
        "activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "layer_norm_epsilon",
        "residual_dropout", "embedding_dropout",
    )
    shape = sizes(
        reader, NAMES, ties_embeddings=True, norm_eps=1e-5, activation="gelu_pytorch_tanh",
        max_position_embeddings=4096,
    )
    use_bias = reader.get("use_bias", True)
    return shape | rope(reader, shape) | {
        "attention_bias": use_bias,
        "mlp_bias": use_bias,
        "windows": equal_windows(reader.get("sliding_window"), shape["num_layers"]),
    }


CONVERSION = Conversion(
    architecture="Starcoder2ForCausalLM", model_type="starcoder2", facts=facts, rules=rules, names=NAMES
)
