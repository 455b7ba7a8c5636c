"""What a converter is: the meaning of a config.json, and a table of weights; and pieces such tables are made of."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converters.config_reader import ConfigReader
from converters.facts import LLAMA_NAMES, dtype_of, usual_values
from converters.rules import KEEP, Ignore, Row, Rule, Transform
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.registry import parse_config


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the checkpoints of one architecture are read."""

    architecture: str
    """Its name in `architectures` of config.json, and in our registry."""
    model_type: str
    """Its name in `model_type`, which stands alone in some files."""
    facts: Callable[[ConfigReader], dict[str, Any]]
    """Asks for every attribute that may change logits; returns ModelConfig's JSON without architecture and dtype."""
    rules: Callable[[ModelConfig], tuple[Row, ...]]
    """The table of weights; which biases must be there follows from the model, not from the table."""
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    """What fields of ModelConfig are called in config.json; others have the same name there."""
    values: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """What `config.json` says in another way than `facts.usual_values`, for the way back."""
    optional_prefix: str = ""
    """What names of tensors begin with, unless the body of the model was saved without its head."""

    def translate(self, values: Mapping[str, Any], *, dtype: str | None, default_dtype: str) -> ModelConfig:
        """Return our facts for a config.json; ValueError, by the file's names, for whatever is not known.

        `dtype` is what the caller wants, `default_dtype` what the tensors are: it counts where the config names none.
        """
        reader = ConfigReader(values, self.architecture)
        facts = self.facts(reader) | {
            "architecture": self.architecture,
            "dtype": dtype_of(reader, asked=dtype, default=default_dtype),
        }
        reader.refuse_rest()
        try:
            return parse_config(facts)
        except ValueError as error:
            raise ValueError(self._in_words_of_the_file(str(error))) from error

    def untranslate(self, config: ModelConfig) -> dict[str, Any]:
        """Return the config.json that `translate` reads as these facts.

        It holds what `facts` asks for and nothing else. ValueError if it would not be read as these facts.
        """
        values = usual_values(config, self.names) | self.values(config)
        reader = ConfigReader(values, self.architecture)
        self.facts(reader)
        known = {"torch_dtype", "pad_token_id", *reader.known}
        values = {name: value for name, value in values.items() if name in known}
        values = {"architectures": [self.architecture], "model_type": self.model_type} | values
        if (found := self.translate(values, dtype=None, default_dtype=config.dtype)) != config:
            changed = [name for name, value in vars(config).items() if getattr(found, name) != value]
            raise ValueError(
                f"{', '.join(changed)}: no config.json of a {self.architecture} can say that, as far as this "
                "converter knows: keep the model in the native format or as Orbax"
            )
        return values

    def _in_words_of_the_file(self, message: str) -> str:
        for ours, theirs in self.names.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        return message


def linear(source: str, target: str, transform: Transform = KEEP) -> tuple[Row, ...]:
    """Return the rows of a linear layer."""
    return Rule(f"{source}.weight", f"{target}.kernel", transform), Rule(f"{source}.bias", f"{target}.bias")


def norm(source: str, target: str) -> tuple[Row, ...]:
    """Return the rows of a norm."""
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def head(config: ModelConfig, embedding: str, source: str = "lm_head") -> tuple[Row, ...]:
    """Return the rows of the output head; where it is tied it may be there again, as a copy of `embedding`."""
    if config.tie_embeddings:
        return (Ignore(f"{source}.weight", because="tied to the embedding", same_as=embedding),)
    return linear(source, "head")
