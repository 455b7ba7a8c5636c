"""A GGUF file with the weights of a Hugging Face folder of a Llama, so that llama.cpp runs what the others run.

Sources: the GGUF specification, and how llama.cpp names the tensors of a Llama. It turns neighbouring pairs of a head's
dimensions where Hugging Face turns halves against each other; the rows of queries and keys are reordered for that.
"""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}  # fmt: skip
WEIGHT_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16,
    "f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32; the peer's environment need not know bfloat16."""
    content = path.read_bytes()
    (header_len,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_len])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + header_len + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            # the upper half of a float32
            wide = np.frombuffer(content[begin:end], np.uint16).astype(np.uint32) << np.uint32(16)
            values = wide.view(np.float32)
        elif entry["dtype"] == "F32":
            values = np.frombuffer(content[begin:end], np.float32)
        else:
            raise ValueError(f"{name} is {entry['dtype']}: only F32 and BF16 are known here")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def paired(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: of each head the i-th of the first half, the i-th of the second."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{PARTS[part]}.weight"


def write_gguf(folder: Path, path: Path, weights: str) -> None:
    """Write `folder`'s model to `path`, matrices as `weights` says (f32, bf16, f16, q8_0), norms in float32."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    # the workload is token ids: no text goes in or out
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        values = paired(tensor, heads[part]) if part in heads else tensor
        kind = WEIGHT_TYPES[weights if values.ndim == 2 else "f32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
