"""Llama shapes with random weights: what a step costs in bytes and floating-point operations, and a folder to load."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bench.workloads import BenchRequest

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama with tied embeddings and no biases."""

    name: str
    model_dim: int
    mlp_dim: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    vocab_size: int = 32_000
    max_position_embeddings: int = 1024

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_q_heads

    @property
    def num_layer_matmul_params(self) -> int:
        """Of all layers together, without the head."""
        projections = 2 * self.model_dim * self.head_dim * (self.num_q_heads + self.num_kv_heads)
        return self.num_layers * (projections + 3 * self.model_dim * self.mlp_dim)

    @property
    def num_params(self) -> int:
        norms = (2 * self.num_layers + 1) * self.model_dim
        return self.num_layer_matmul_params + self.vocab_size * self.model_dim + norms

    def decode_bytes(self, context_len: float, dtype: str) -> float:
        """Bytes one decode step of one sequence must read: every weight once (head = embedding), keys, values."""
        kv_params = 2 * self.num_layers * self.num_kv_heads * self.head_dim * context_len
        return (self.num_params + kv_params) * DTYPES[dtype].itemsize

    def flops(self, requests: Sequence[BenchRequest]) -> int:
        """Floating-point operations that serving `requests` needs at least: no padding, logits of sampled rows only."""
        total = 0
        for request in requests:
            # the last sampled token is never put through the model
            num_tokens = len(request.prompt_token_ids) + request.max_tokens - 1
            attention = 4 * self.num_layers * self.num_q_heads * self.head_dim * (num_tokens * (num_tokens + 1) // 2)
            head = 2 * self.model_dim * self.vocab_size * request.max_tokens
            total += 2 * self.num_layer_matmul_params * num_tokens + attention + head
        return total


SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape(name="tiny", model_dim=64, mlp_dim=128, num_layers=2, num_q_heads=4, num_kv_heads=2, vocab_size=512),
        LlamaShape(name="15M", model_dim=288, mlp_dim=768, num_layers=6, num_q_heads=6, num_kv_heads=6),
        LlamaShape(name="110M", model_dim=768, mlp_dim=2048, num_layers=12, num_q_heads=12, num_kv_heads=4),
    )
}


def _weights(shape: LlamaShape, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face names and float32 values.

    Projections keep the variance; embeddings give logits a deviation of about 3, so that greedy choices are rarely
    near-ties, and are small beside the branches, so that the tied head does not repeat the last token for ever.
    """
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / math.sqrt(columns))

    dim, kv_dim = shape.model_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", normal(shape.vocab_size, dim, 3.0)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", normal(dim, dim)
        yield prefix + "self_attn.k_proj.weight", normal(kv_dim, dim)
        yield prefix + "self_attn.v_proj.weight", normal(kv_dim, dim)
        yield prefix + "self_attn.o_proj.weight", normal(dim, dim)
        yield prefix + "mlp.gate_proj.weight", normal(shape.mlp_dim, dim)
        yield prefix + "mlp.up_proj.weight", normal(shape.mlp_dim, dim)
        yield prefix + "mlp.down_proj.weight", normal(dim, shape.mlp_dim)
        yield prefix + "input_layernorm.weight", np.ones(dim, np.float32)
        yield prefix + "post_attention_layernorm.weight", np.ones(dim, np.float32)
    yield "model.norm.weight", np.ones(dim, np.float32)


def write_model(shape: LlamaShape, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a Hugging Face folder with the weights that `seed` gives; every engine under test loads this one folder.

    The tokenizer maps the words t0, t1, ... to their numbers; no workload uses it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.model_dim,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}) + "\n")
    tensors = {name: np.ascontiguousarray(value.astype(DTYPES[dtype])) for name, value in _weights(shape, seed)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({f"t{index}": index for index in range(shape.vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t1", "eos_token": "t2"}) + "\n"
    )
    return folder
