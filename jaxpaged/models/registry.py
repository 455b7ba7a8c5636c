"""The architectures, by the name that checkpoints give them."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

from flax import nnx

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.llama import LlamaForCausalLM

MODELS: Mapping[str, type[LlamaForCausalLM]] = MappingProxyType({"LlamaForCausalLM": LlamaForCausalLM})
"""One row per architecture."""


def build_abstract(config: ModelConfig, *, max_model_len: int | None = None) -> LlamaForCausalLM:
    """Return the model with shapes in place of weights: costs no memory; fill it with `parameters.fill`."""
    if config.architecture not in MODELS:
        raise ValueError(f"architecture={config.architecture!r} is not known: it must be one of {sorted(MODELS)}")
    return nnx.eval_shape(functools.partial(MODELS[config.architecture], config, max_model_len=max_model_len))
