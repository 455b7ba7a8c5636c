"""Tiny Hugging Face checkpoints with every parameter random, and a dense attention to run them with."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
"""Head dimension 8 and theta 100: the wave lengths are 6, 20, 63 and 199 tokens, around the lengths of the tests."""

SHORT = [1.0, 1.1, 1.3, 1.2]
LONG = [1.5, 2.0, 3.0, 5.0]

CASES: dict[str, dict[str, Any]] = {
    "mha_untied": {},
    "gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "attention_bias": {"attention_bias": True},
    "head_dim": {"head_dim": 12},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic_within": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
    "dynamic_beyond": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        "max_position_embeddings": 16,
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
            "beta_fast": 2.0, "beta_slow": 0.25,
        }
    },
    "yarn_mscale": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.5,
            "beta_slow": 0.2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
        }
    },
    "yarn_attention_factor": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25,
        }
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        }
    },
    "longrope_short": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "rope_theta": 100.0,
            "original_max_position_embeddings": 32,
        }
    },
    "longrope_long": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        "original_max_position_embeddings": 16,
    },
}
"""What each case changes of BASE."""

NUM_TOKENS = 24

MAX_MODEL_LEN = {"dynamic_beyond": NUM_TOKENS, "dynamic_within": NUM_TOKENS, "longrope_short": NUM_TOKENS}
"""For the scalings that read it: the length of the tokens, so that transformers decides as we do."""


def hf_config(case: str) -> dict[str, Any]:
    """Return the config.json of the case."""
    return json.loads(json.dumps(BASE | CASES[case]))


def tokens(case: str) -> np.ndarray:
    """Return the token ids the case is run on."""
    return np.random.default_rng(len(case)).integers(3, BASE["vocab_size"], NUM_TOKENS).astype(np.int32)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors a Llama of this config has, by their Hugging Face names."""
    dim, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention = {"q_proj": (query, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, query)}
        mlps = {"gate_proj": (mlp, dim), "up_proj": (mlp, dim), "down_proj": (dim, mlp)}
        for name, shape in attention.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        for name, shape in mlps.items():
            shapes[f"{layer}.mlp.{name}.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{layer}.mlp.{name}.bias"] = shape[:1]
        shapes[f"{layer}.input_layernorm.weight"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (dim,)
    shapes["model.norm.weight"] = (dim,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], dim)
    return shapes


def weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return float32 weights by Hugging Face names: norms around 1, everything else around 0, nothing constant."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(1.0 if "norm" in name else 0.0, 0.25, shape)).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_shards: int = 1,
    dtype: str = "float32",
) -> Path:
    """Write a Hugging Face folder, sharded with an index if asked for, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    cast = {name: np.ascontiguousarray(tensor.astype(numpy_dtype)) for name, tensor in tensors.items()}
    if num_shards == 1:
        save_file(cast, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(cast)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard::num_shards]
        save_file({name: cast[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in cast.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_case(folder: Path, case: str) -> Path:
    """Write the checkpoint of a parity case."""
    config = hf_config(case)
    return write_folder(folder, config, weights(config))


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    metadata: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attend one sequence; `kv` holds its keys and values by position, `metadata` the position of the first token."""
    keys = jax.lax.dynamic_update_slice_in_dim(kv[0], key.astype(jnp.float32), metadata, 0)
    values = jax.lax.dynamic_update_slice_in_dim(kv[1], value.astype(jnp.float32), metadata, 0)
    num_tokens, num_heads, head_dim = query.shape
    grouped = query.astype(jnp.float32).reshape(num_tokens, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("tkgd,skd->tkgs", grouped, keys) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    positions = metadata + jnp.arange(num_tokens)
    distance = positions[:, None] - jnp.arange(keys.shape[0])[None, :]
    is_seen = (distance >= 0) & (distance < (keys.shape[0] if window is None else window))
    probabilities = jax.nn.softmax(jnp.where(is_seen[:, None, None, :], scores, -jnp.inf), axis=-1)
    attended = jnp.einsum("tkgs,skd->tkgd", probabilities, values)
    return attended.reshape(num_tokens, num_heads, head_dim).astype(query.dtype), (keys, values)


def empty_kv(config: Any, length: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Return the dense caches of a ModelConfig's layers, for sequences of up to `length` tokens."""
    shape = (length, config.num_kv_heads, config.head_dim)
    return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers))


@functools.partial(jax.jit, static_argnames="graph")
def _step(graph: Any, state: Any, token_ids: jax.Array, start: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
    model = nnx.merge(graph, state)
    positions = start + jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    hidden, kv = model(token_ids, positions, kv, start, dense_attention)
    return model.logits(hidden), kv


def run_dense(model: Any, token_ids: np.ndarray, start: int, kv: Any) -> tuple[np.ndarray, Any]:
    """Return the logits of every token, and the caches with the tokens written from position `start` on."""
    graph, state = nnx.split(model)
    logits, kv = _step(graph, state, jnp.asarray(token_ids), jnp.int32(start), kv)
    return np.asarray(logits), kv
