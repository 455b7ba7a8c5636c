"""Reading config.json so that nothing in it is overlooked: what no one asked for is refused by name."""

from collections.abc import Mapping
from typing import Any

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
        "begin_suppress_tokens", "gradient_checkpointing", "cache_implementation",
    }
)
"""Attributes that change the logits of no model at inference (generation defaults in config.json included:
transformers, too, reads those from generation_config.json)."""

HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None,),
}
"""Attributes that are accepted with these values only, because no model has a part that would obey another."""


class ConfigReader:
    """The attributes of a config.json; one that was asked for is known, any other is refused by `refuse_rest`."""

    def __init__(self, values: Mapping[str, Any], model_name: str) -> None:
        """`model_name` is what errors call the model. Remote code and quantized weights are refused at once."""
        self._values = values
        self._model_name = model_name
        self._known = {"architectures", "model_type", "auto_map", "quantization_config"}
        if values.get("auto_map"):
            raise ValueError(
                f"auto_map={values['auto_map']!r} asks for code of the checkpoint: no remote code is ever run; take "
                "auto_map out of config.json to use the port that is here"
            )
        if values.get("quantization_config") is not None:
            raise ValueError("quantization_config: quantized weights are not read; take the unquantized checkpoint")

    @property
    def known(self) -> frozenset[str]:
        """The attributes that were asked for, and those every reader knows."""
        return frozenset(self._known)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute; the default where it is absent or null."""
        self._known.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def get_or_null(self, name: str, default: Any) -> Any:
        """Return an attribute that means something else when it is null than when it is absent."""
        value = self.get(name)
        return value if name in self._values else default

    def required(self, name: str) -> Any:
        """Return an attribute that must be there."""
        value = self.get(name)
        if value is None:
            raise ValueError(f"{name} is missing: the config.json of a {self._model_name} must have it")
        return value

    def whole_number(self, name: str, default: int | None = None, *, largest: int = 2**20) -> int:
        """Return a whole number from 1 to `largest`, with which can be reckoned; required if there is no default."""
        value = self.required(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 to {largest}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raise ValueError unless the attribute is absent, null or one of these values, which mean the same here."""
        value = self.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in allowed):
            raise ValueError(f"{name}={value!r} is not supported: it must be one of {(None, *allowed)}")

    def ignore(self, *names: str) -> None:
        """Take attributes as known that change no logits of this model."""
        self._known.update(names)

    def refuse_rest(self) -> None:
        """Raise ValueError, by name, for an attribute that was not asked for and might matter."""
        for name, value in self._values.items():
            if name in self._known or name in WITHOUT_EFFECT:
                continue
            if name not in HARMLESS_VALUES:
                raise ValueError(
                    f"attribute {name!r} ({value!r}) is not known to this converter, and might matter: take it out of "
                    "config.json only if logits do not depend on it"
                )
            if value not in HARMLESS_VALUES[name]:
                raise ValueError(f"{name}={value!r} is not supported: it must be one of {HARMLESS_VALUES[name]}")
