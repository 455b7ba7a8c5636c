"""The architectures, by the name that checkpoints give them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flax import nnx

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.gemma import gemma
from jaxpaged.models.gemma2 import Gemma2Extras, gemma2
from jaxpaged.models.gemma3 import Gemma3Extras, gemma3
from jaxpaged.models.gpt2 import gpt2
from jaxpaged.models.gpt_neox import GPTNeoXExtras, gpt_neox
from jaxpaged.models.gptj import gptj
from jaxpaged.models.llama import llama
from jaxpaged.models.mixtral import mixtral
from jaxpaged.models.olmo2 import olmo2
from jaxpaged.models.opt import OPTExtras, opt
from jaxpaged.models.qwen2 import qwen2
from jaxpaged.models.qwen3 import qwen3
from jaxpaged.models.qwen3_moe import qwen3_moe
from jaxpaged.models.smollm3 import SmolLM3Extras, smollm3
from jaxpaged.models.starcoder2 import starcoder2


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table: how a model is built of its facts, and what to tell people about it."""

    build: Callable[..., Decoder]
    """`build(config, max_model_len=None)`, parameters as zeros and ones."""
    examples: str
    """Models of this architecture."""
    features: str
    """What it has beyond rotary positions, RMS norms, a gated MLP and grouped-query attention, or instead of them."""
    extras: type | None = None
    """The type of `ModelConfig.extras`."""


MODELS: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture(
            build=llama,
            examples="Llama 1, 2 and 3.x, TinyLlama, SmolLM 1 and 2",
            features="every rope scaling; biases",
        ),
        "MistralForCausalLM": Architecture(
            build=llama, examples="Mistral 7B, Mistral Nemo, Mistral Small", features="sliding window"
        ),
        "Qwen2ForCausalLM": Architecture(
            build=qwen2,
            examples="Qwen 2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
            features="biases of query, key and value; sliding window in upper layers",
        ),
        "Qwen3ForCausalLM": Architecture(
            build=qwen3, examples="Qwen 3", features="query and key norms; sliding window in upper layers"
        ),
        "GemmaForCausalLM": Architecture(
            build=gemma,
            examples="Gemma, CodeGemma",
            features="scaled embeddings; norms that hold the difference from 1",
        ),
        "Gemma2ForCausalLM": Architecture(
            build=gemma2,
            extras=Gemma2Extras,
            examples="Gemma 2",
            features="as Gemma; norms before and behind; soft caps; sliding window in every other layer",
        ),
        "Gemma3ForCausalLM": Architecture(
            build=gemma3,
            extras=Gemma3Extras,
            examples="Gemma 3, text (270M, 1B)",
            features="as Gemma 2; query and key norms; a rope of its own in layers with a window",
        ),
        "Phi3ForCausalLM": Architecture(
            build=llama,
            examples="Phi 3, 3.5 and 4, Phi-4-mini (not the mixtures)",
            features="fused weights are split; partial rotary positions; longrope; sliding window",
        ),
        "Olmo2ForCausalLM": Architecture(
            build=olmo2, examples="OLMo 2", features="norms behind attention and MLP; norms of whole queries and keys"
        ),
        "SmolLM3ForCausalLM": Architecture(
            build=smollm3, extras=SmolLM3Extras, examples="SmolLM 3", features="layers without positions"
        ),
        "Starcoder2ForCausalLM": Architecture(
            build=starcoder2, examples="StarCoder 2", features="layer norms; plain MLP; biases; sliding window"
        ),
        "MixtralForCausalLM": Architecture(
            build=mixtral, examples="Mixtral 8x7B and 8x22B", features="mixture of experts; sliding window"
        ),
        "Qwen3MoeForCausalLM": Architecture(
            build=qwen3_moe,
            examples="Qwen 3 30B-A3B and 235B-A22B",
            features="mixture of experts, plain MLPs in some layers; query and key norms; sliding window",
        ),
        "GPT2LMHeadModel": Architecture(
            build=gpt2,
            examples="GPT-2, DistilGPT-2",
            features="learned positions; layer norms; plain MLP; biases; multi-head attention",
        ),
        "GPTNeoXForCausalLM": Architecture(
            build=gpt_neox,
            extras=GPTNeoXExtras,
            examples="GPT-NeoX 20B, Pythia",
            features="parallel residual or not; layer norms; plain MLP; biases; partial rotary positions; multi-head",
        ),
        "GPTJForCausalLM": Architecture(
            build=gptj,
            examples="GPT-J 6B",
            features="parallel residual; layer norms; plain MLP; interleaved partial rotary positions; multi-head",
        ),
        "OPTForCausalLM": Architecture(
            build=opt,
            extras=OPTExtras,
            examples="OPT, 125M to 175B (350M too), Galactica",
            features="learned positions; layer norms before or behind; projected embeddings; plain MLP; multi-head",
        ),
    }
)
"""One row per architecture. Each is compared with transformers, logits and tokens (`tests/families.py`)."""


def _row(architecture: Any) -> Architecture:
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise ValueError(f"architecture={architecture!r} is not known: it must be one of {sorted(MODELS)}")
    return MODELS[architecture]


def parse_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the facts that `ModelConfig.as_json` wrote, with the extras of their architecture; else ValueError."""
    name = values.get("architecture")
    return ModelConfig.from_json(values, None if name is None else _row(name).extras)


def build_abstract(config: ModelConfig, *, max_model_len: int | None = None) -> Decoder:
    """Return the model with shapes in place of weights: costs no memory; fill it with `parameters.fill`."""
    row = _row(config.architecture)
    expected = type(None) if row.extras is None else row.extras
    if not isinstance(config.extras, expected):
        raise ValueError(f"extras={config.extras!r} must be of type {expected.__name__} for {config.architecture}")
    return nnx.eval_shape(functools.partial(row.build, config, max_model_len=max_model_len))


def support_matrix() -> str:
    """Return the architectures as a table in Markdown: what is served, and that each is compared with transformers."""
    rows = ["| architecture | models | features | compared with transformers |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {row.examples} | {row.features} | logits within 1e-4, 32 greedy tokens |"
        for name, row in sorted(MODELS.items())
    ]
    return "\n".join(rows)
