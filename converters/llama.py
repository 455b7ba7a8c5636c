"""Llama 1, 2 and 3.x from Hugging Face: the meaning of its config.json, and the names of its weights."""

from collections.abc import Mapping
from typing import Any

from converters.rules import Ignore, Row, Rule
from jaxpaged.models.config import ModelConfig

DEFAULT_ROPE_THETA = 10_000.0

READ = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters",
        "original_max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "architectures",
        "model_type",
    }
)
"""Attributes that are translated."""

WITHOUT_EFFECT = frozenset(
    {
        "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "initializer_range", "use_cache",
        "pad_token_id", "pretraining_tp", "attention_dropout", "max_sequence_length", "tokenizer_class",
        "torchscript", "return_dict", "output_attentions", "output_hidden_states", "use_return_dict",
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
        "id2label", "label2id", "num_labels", "finetuning_task", "problem_type", "task_specific_params", "prefix",
        "sep_token_id", "decoder_start_token_id", "tf_legacy_loss", "use_bfloat16", "max_length", "min_length",
        "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens",
    }
)
"""Attributes that do not change the logits of a Llama at inference (generation defaults in config.json included:
transformers, too, reads those from generation_config.json)."""

HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),
}
"""Attributes that are accepted with these values only, because the model has no part that would obey another."""

CONFIG_NAMES: Mapping[str, str] = {
    "model_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    "eos_token_ids": "eos_token_id",
}
"""Fields of ModelConfig that config.json calls otherwise."""

ACTIVATION_NAMES: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

DTYPE_NAMES: Mapping[str, str] = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
"""float16 is widened: float32 holds it exactly, bfloat16 would not, and float16 itself overflows and is slow on CPU."""


def translate(values: Mapping[str, Any], *, dtype: str | None, default_dtype: str) -> ModelConfig:
    """Return our facts for a Hugging Face Llama config; ValueError, by name, for whatever it does not know.

    `dtype` is what the caller wants, `default_dtype` what the tensors are: it counts where the config names none.
    """
    _refuse_unknown(values)
    num_q_heads = _required(values, "num_attention_heads")
    hidden_size = _required(values, "hidden_size")
    head_dim = values.get("head_dim")
    if head_dim is None:
        if not isinstance(hidden_size, int) or not isinstance(num_q_heads, int) or num_q_heads < 1:
            raise ValueError(f"hidden_size={hidden_size!r}, num_attention_heads={num_q_heads!r} must be whole numbers")
        if hidden_size % num_q_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_q_heads}")
        head_dim = hidden_size // num_q_heads
    num_kv_heads = values.get("num_key_value_heads")
    activation = values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATION_NAMES:
        raise ValueError(f"hidden_act={activation!r} is not known: it must be one of {sorted(ACTIVATION_NAMES)}")
    max_position_embeddings = values.get("max_position_embeddings", 2048)
    rope_theta, rope_scaling = _rope(values, max_position_embeddings)
    own_dtype = values.get("dtype") or values.get("torch_dtype") or default_dtype
    if dtype is None and (not isinstance(own_dtype, str) or own_dtype not in DTYPE_NAMES):
        raise ValueError(f"dtype={own_dtype!r} is not known: pass dtype= to choose float32 or bfloat16")
    return ModelConfig.from_json(
        {
            "architecture": "LlamaForCausalLM",
            "vocab_size": _required(values, "vocab_size"),
            "model_dim": hidden_size,
            "mlp_dim": _required(values, "intermediate_size"),
            "num_layers": _required(values, "num_hidden_layers"),
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_q_heads if num_kv_heads is None else num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "tie_embeddings": values.get("tie_word_embeddings", False),
            "attention_bias": values.get("attention_bias", False),
            "mlp_bias": values.get("mlp_bias", False),
            "activation": ACTIVATION_NAMES[activation],
            "dtype": DTYPE_NAMES[own_dtype] if dtype is None else dtype,
            "bos_token_id": values.get("bos_token_id"),
            "eos_token_ids": as_list(values.get("eos_token_id")),
        }
    )


def _required(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"{name} is missing: a Llama's config.json must have it")
    return values[name]


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in READ or name in WITHOUT_EFFECT:
            continue
        if name == "auto_map" and value:
            raise ValueError(f"auto_map={value!r} asks for code of the checkpoint: no remote code is ever run")
        if name == "quantization_config" and value is not None:
            raise ValueError("quantization_config: quantized weights are not read; take the unquantized checkpoint")
        if name not in HARMLESS_VALUES:
            raise ValueError(f"attribute {name!r} ({value!r}) is not known to this converter, and might matter")
        if value not in HARMLESS_VALUES[name]:
            raise ValueError(f"{name}={value!r} is not supported: it must be one of {HARMLESS_VALUES[name]}")


def as_list(token_ids: Any) -> list[Any]:
    """Return the ids of an eos_token_id, which may be absent, one id, or a list; they are checked by ModelConfig."""
    if token_ids is None:
        return []
    return token_ids if isinstance(token_ids, list) else [token_ids]


def _rope(values: Mapping[str, Any], max_position_embeddings: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return theta and scaling, as ModelConfig's JSON has them.

    They come from `rope_parameters` (transformers 5) or from `rope_scaling` and `rope_theta` (before). Precedence and
    defaults are those of transformers: theta inside the object wins over the one beside it;
    `original_max_position_embeddings` beside it wins over the one inside, and falls back to max_position_embeddings.
    """
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(f"rope_parameters={new!r} and rope_scaling={old!r} contradict each other: keep one")
    parameters = old or new or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope parameters {parameters!r} must be an object")
    parameters = dict(parameters)
    legacy_type = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", legacy_type or "default")
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = values.get("rope_theta")
    if theta is None:
        theta = DEFAULT_ROPE_THETA
    if parameters.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError("partial_rotary_factor other than 1.0 is not supported: Llama rotates whole heads")
    if not isinstance(rope_type, str):
        raise ValueError(f"rope_type={rope_type!r} must be a string")
    if rope_type == "default":
        if parameters:
            raise ValueError(f"rope_type='default' has no {sorted(parameters)}: take them out")
        return theta, None
    outer_original = values.get("original_max_position_embeddings")
    if rope_type in ("llama3", "yarn", "longrope"):
        if outer_original is not None:
            parameters["original_max_position_embeddings"] = outer_original
        elif parameters.get("original_max_position_embeddings") is None:
            parameters["original_max_position_embeddings"] = max_position_embeddings
    elif parameters.get("original_max_position_embeddings") is not None:
        # written by some exporters; neither scaling reads it
        del parameters["original_max_position_embeddings"]
    return theta, {"rope_type": rope_type} | parameters


def rules(config: ModelConfig) -> tuple[Row, ...]:
    """Return the table of weights; which biases must be there follows from the model, not from this table."""
    linear = (
        ("self_attn.q_proj", "attention.query"),
        ("self_attn.k_proj", "attention.key"),
        ("self_attn.v_proj", "attention.value"),
        ("self_attn.o_proj", "attention.output"),
        ("mlp.gate_proj", "mlp.gate"),
        ("mlp.up_proj", "mlp.up"),
        ("mlp.down_proj", "mlp.down"),
    )
    return (
        Rule("model.embed_tokens.weight", "embedding.table"),
        *(Rule(f"model.layers.{{i}}.{s}.weight", f"layers.{{i}}.{t}.kernel") for s, t in linear),
        *(Rule(f"model.layers.{{i}}.{s}.bias", f"layers.{{i}}.{t}.bias") for s, t in linear),
        Rule("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.scale"),
        Rule("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
        Rule("model.norm.weight", "norm.scale"),
        (
            Ignore("lm_head.weight", because="tied to the embedding", same_as="model.embed_tokens.weight")
            if config.tie_embeddings
            else Rule("lm_head.weight", "head.kernel")
        ),
        Ignore("model.layers.{i}.self_attn.rotary_emb.inv_freq", because="recomputed from rope_theta"),
        Ignore("model.rotary_emb.inv_freq", because="recomputed from rope_theta"),
    )
