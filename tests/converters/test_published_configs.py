"""Files as their makers published them: every attribute is known, and models have as many parameters as is said."""

import json

import numpy as np
import pytest
from families import CASES, config_json, golden, weights
from tiny_checkpoints import write_folder

from converters import load_huggingface
from converters.architectures import ARCHITECTURES
from jaxpaged.models.parameters import parameter_arrays, parameter_specs
from jaxpaged.models.registry import build_abstract

PUBLISHED = {
    "GPT-2": (
        124_439_808,
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}""",
    ),
    "OPT 350M": (
        331_196_416,
        """{"_name_or_path": "facebook/opt-350m", "_remove_final_layer_norm": false, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 2, "do_layer_norm_before": false, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096,
        "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
        "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1,
        "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.20.0.dev0", "use_cache": true,
        "vocab_size": 50272, "word_embed_proj_dim": 512}""",
    ),
    "Pythia 70M": (
        70_426_624,
        """{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true, "vocab_size": 50304}""",
    ),
    "GPT-J 6B": (
        6_050_882_784,
        """{"activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
        "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "gradient_checkpointing": false,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
        "n_inner": null, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": true, "rotary_dim": 64,
        "scale_attn_weights": true, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "tie_word_embeddings": false, "tokenizer_class": "GPT2Tokenizer", "use_cache": true, "vocab_size": 50400}""",
    ),
    "Mistral 7B v0.1": (
        7_241_732_096,
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    ),
    "Qwen 2.5 0.5B": (
        494_032_768,
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}""",
    ),
    "Gemma 2 2B": (
        2_614_341_888,
        """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256000}""",
    ),
    "Gemma 3 1B": (
        999_885_952,
        """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
    ),
    "Mixtral 8x7B": (
        46_702_792_704,
        """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    ),
    "Qwen 3 30B-A3B": (
        30_532_122_624,
        """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    ),
}
"""Parameters as published, and config.json."""


def translated(values):
    (name,) = values["architectures"]
    return ARCHITECTURES[name].translate(values, dtype=None, default_dtype="float32")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_understood_and_has_its_parameters(name):
    num_parameters, text = PUBLISHED[name]
    specs = parameter_specs(build_abstract(translated(json.loads(text))))
    assert sum(int(np.prod(spec.shape)) for spec in specs.values()) == num_parameters


def test_windows_and_ropes_of_gemma_3_alternate_five_to_one():
    config = translated(json.loads(PUBLISHED["Gemma 3 1B"][1]))
    assert config.windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert config.rope_theta == 1e6
    assert config.extras.window_rope_theta == 1e4


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("GPT-2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("GPT-2", {"n_layer": 10**9}, "n_layer=1000000000 must be a whole number from 1 to 4096"),
        ("OPT 350M", {"tie_word_embeddings": False}, "word_embed_proj_dim=512 other than hidden_size=1024"),
        ("Pythia 70M", {"rotary_pct": 1.5}, "rotary_pct=1.5 must be a number above 0, up to 1"),
        ("GPT-J 6B", {"rotary_dim": None}, "rotary_dim=None is not supported"),
        ("Mistral 7B v0.1", {"sliding_window": 0}, "a window of 0 tokens must be 1 or more"),
        ("Mistral 7B v0.1", {"sliding_window": "4096"}, "sliding_window='4096' must be a whole number"),
        ("Qwen 2.5 0.5B", {"layer_types": ["chunked_attention"] * 24}, "layer_types=.* each one of"),
        ("Qwen 2.5 0.5B", {"use_sliding_window": "yes"}, "use_sliding_window='yes' must be true or false"),
        ("Gemma 2 2B", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be a positive number"),
        ("Gemma 2 2B", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("Gemma 3 1B", {"rope_scaling": {"rope_type": "ntk"}}, "rope_type='ntk' is not known"),
        ("Gemma 3 1B", {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"x": {}}}, "must be an object of"),
        ("Mixtral 8x7B", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be from 1 to num_local_experts=8"),
        ("Qwen 3 30B-A3B", {"num_experts": 0}, "num_experts=0 must be a whole number"),
    ],
)
def test_what_no_part_would_obey_is_refused_by_the_name_that_the_file_has(name, changes, said):
    with pytest.raises(ValueError, match=said):
        translated(json.loads(PUBLISHED[name][1]) | changes)


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_a_body_that_was_saved_without_its_head_is_read(tmp_path, case):
    recorded = golden(case)
    tensors = weights(case, recorded["shapes"], recorded["seed"])
    prefix = ARCHITECTURES[CASES[case][0]].optional_prefix
    whole = write_folder(tmp_path / "whole", config_json(case), tensors)
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    body = write_folder(tmp_path / "body", config_json(case), short)
    arrays = [parameter_arrays(load_huggingface(folder)[1]) for folder in (whole, body)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name])
