"""Tiny Hugging Face checkpoints of every architecture: configs, weights without a constant among them, prompts.

Names and shapes of tensors, the seed of the weights, logits and greedy tokens are recorded from transformers by
`family_goldens.py`.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoints import write_folder

GOLDENS = Path(__file__).parent / "goldens" / "families"
VOCAB_SIZE = 61
NUM_NEW_TOKENS = 32

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rope_theta": 100.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Odd sizes: 6 heads of 4, 61 tokens, 3 layers. Theta 100 gives waves of 6 and 63 tokens."""

OLD = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""In the words of GPT-2 and GPT-J."""

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 96,
    "rotary_emb_base": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "ffn_dim": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 96,
    "do_layer_norm_before": True,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM", SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 6}
    ),
    "llama_tied": (
        "LlamaForCausalLM", SMALL | {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True}
    ),
    "mistral": ("MistralForCausalLM", SMALL | {"model_type": "mistral", "sliding_window": 7}),
    "mistral_tied": (
        "MistralForCausalLM",
        SMALL | {
            "model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True, "head_dim": 10,
            "num_key_value_heads": 6,
        },
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        SMALL | {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_mha": ("Qwen2ForCausalLM", SMALL | {"model_type": "qwen2", "num_key_value_heads": 6, "sliding_window": 5}),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"model_type": "qwen3", "head_dim": 6, "num_key_value_heads": 3}),
    "qwen3_tied": (
        "Qwen3ForCausalLM",
        SMALL | {
            "model_type": "qwen3", "head_dim": 4, "tie_word_embeddings": True, "num_key_value_heads": 6,
            "attention_bias": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": True, "sliding_window": 9,
        },
    ),
    "gemma": (
        "GemmaForCausalLM",
        SMALL | {
            "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "head_dim": 10, "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "gemma_mha": ("GemmaForCausalLM", SMALL | {"model_type": "gemma", "head_dim": 4, "num_key_value_heads": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        SMALL | {
            "model_type": "gemma2", "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
        },
    ),
    "gemma2_mha": (
        "Gemma2ForCausalLM",
        SMALL | {
            "model_type": "gemma2", "head_dim": 4, "sliding_window": 8, "num_key_value_heads": 6,
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        SMALL | {
            "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 11, "rope_local_base_freq": 10.0, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "gemma3_new": (
        "Gemma3ForCausalLM",
        {name: value for name, value in SMALL.items() if name != "rope_theta"} | {
            "model_type": "gemma3_text", "head_dim": 4, "sliding_window": 9, "num_key_value_heads": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 200.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        SMALL | {
            "model_type": "phi3", "num_attention_heads": 3, "num_key_value_heads": 1, "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 4, "tie_word_embeddings": True, "pad_token_id": 0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.25, 3.0]},
        },
    ),
    "phi3_mha": (
        "Phi3ForCausalLM",
        SMALL | {"model_type": "phi3", "num_key_value_heads": 6, "sliding_window": 7, "pad_token_id": 0},
    ),
    "olmo2": ("Olmo2ForCausalLM", SMALL | {"model_type": "olmo2", "num_key_value_heads": 3, "attention_bias": True}),
    "olmo2_tied": (
        "Olmo2ForCausalLM", SMALL | {"model_type": "olmo2", "num_key_value_heads": 6, "tie_word_embeddings": True}
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        SMALL | {
            "model_type": "smollm3", "no_rope_layer_interval": 2, "tie_word_embeddings": True, "pad_token_id": 0,
            "use_sliding_window": True, "sliding_window": 6,
        },
    ),
    "smollm3_mha": (
        "SmolLM3ForCausalLM",
        SMALL | {
            "model_type": "smollm3", "no_rope_layers": [0, 1, 1], "num_key_value_heads": 6, "attention_bias": True,
            "mlp_bias": True, "pad_token_id": 0,
        },
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        SMALL | {"model_type": "starcoder2", "tie_word_embeddings": True, "sliding_window": 7},
    ),
    "starcoder2_mha": (
        "Starcoder2ForCausalLM",
        SMALL | {"model_type": "starcoder2", "use_bias": False, "num_key_value_heads": 6, "hidden_act": "gelu"},
    ),
    "gpt2": ("GPT2LMHeadModel", OLD | {"model_type": "gpt2", "tie_word_embeddings": True}),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        OLD | {
            "model_type": "gpt2", "tie_word_embeddings": False, "n_inner": 20, "n_head": 8,
            "activation_function": "relu",
        },
    ),
    "gptj": ("GPTJForCausalLM", OLD | {"model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False}),
    "gptj_whole": (
        "GPTJForCausalLM",
        OLD | {"model_type": "gptj", "rotary_dim": 8, "tie_word_embeddings": False, "n_inner": 20},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM", NEOX | {"rotary_pct": 0.5, "use_parallel_residual": True, "tie_word_embeddings": False}
    ),
    "gpt_neox_in_turn": (
        "GPTNeoXForCausalLM",
        NEOX | {
            "rotary_pct": 1.0, "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False,
            "num_attention_heads": 6, "hidden_act": "gelu_fast",
        },
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt_350m": (
        "OPTForCausalLM", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 14, "num_attention_heads": 6}
    ),
    "opt_galactica": (
        "OPTForCausalLM",
        OPT | {
            "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        SMALL | {
            "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7,
            "intermediate_size": 20,
        },
    ),
    "mixtral_mha": (
        "MixtralForCausalLM",
        SMALL | {
            "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 6,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        SMALL | {
            "model_type": "qwen3_moe", "head_dim": 6, "num_experts": 7, "num_experts_per_tok": 3,
            "moe_intermediate_size": 14, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe_mha": (
        "Qwen3MoeForCausalLM",
        SMALL | {
            "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
            "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [], "num_key_value_heads": 6,
            "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "attention_bias": True,
        },
    ),
}
"""(architecture, config.json) of each case."""

ZERO_CENTRED_NORMS = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
"""Architectures whose norms hold the difference from 1."""


def config_json(case: str) -> dict[str, Any]:
    """Return the config.json of the case."""
    architecture, values = CASES[case]
    return json.loads(json.dumps({"architectures": [architecture], "torch_dtype": "float32"} | values))


def prompts() -> list[list[int]]:
    """Return ragged prompts, longer than any window; the second begins with 24 tokens of the first."""
    rng = np.random.default_rng(5)
    first, second, third = (rng.integers(3, VOCAB_SIZE, length).tolist() for length in (37, 9, 5))
    return [first, first[:24] + second, third]


def weights(case: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face names, each drawn for itself: norms around 1, everything else around 0."""
    centre_of_norms = 0.0 if CASES[case][0] in ZERO_CENTRED_NORMS else 1.0
    drawn = {}
    for name, shape in shapes.items():
        is_norm = name.endswith(".weight") and len(shape) == 1
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn[name] = rng.normal(centre_of_norms if is_norm else 0.0, 0.25, shape).astype(np.float32)
    return drawn


def golden(case: str) -> dict[str, Any]:
    """Return what was recorded: `shapes` by tensor, `seed`, `logits` of each prompt, `greedy` tokens of each."""
    with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as stored:
        shapes = [tuple(map(int, str(shape).split())) for shape in stored["shapes"]]
        return {
            "shapes": dict(zip(map(str, stored["names"]), shapes, strict=True)),
            "seed": int(stored["seed"]),
            "logits": [stored[f"logits{i}"] for i in range(len(prompts()))],
            "greedy": stored["greedy"].tolist(),
        }


def write_family(folder: Path, case: str, **changes: Any) -> Path:
    """Write the checkpoint of a case, with changes to its config.json."""
    recorded = golden(case)
    return write_folder(folder, config_json(case) | changes, weights(case, recorded["shapes"], recorded["seed"]))
