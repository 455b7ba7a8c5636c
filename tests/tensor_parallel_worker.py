"""Runs tiny models on 1, 4 and 8 virtual CPU devices and prints what they gave as one line of JSON.

A process of its own, as the number of devices is fixed when jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/tensor_parallel_worker.py CASE...
"""

import json
import sys
from typing import Any

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

from harness import make_engine, random_prompts, run, tiny_model  # noqa: E402  strict from the first trace on

from jaxpaged.models.config import ExpertsConfig  # noqa: E402
from jaxpaged.models.gemma2 import Gemma2Extras  # noqa: E402
from jaxpaged.sampling_params import SamplingParams  # noqa: E402

WIDE = {"model_dim": 64, "mlp_dim": 96, "num_q_heads": 8, "head_dim": 8}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "multi-head": (WIDE | {"num_kv_heads": 8}, (4, 8)),
    "few kv heads, tied": (
        WIDE | {"num_kv_heads": 2, "tie_embeddings": True, "attention_bias": True, "mlp_bias": True}, (4, 8)
    ),
    "mixture": (
        WIDE | {
            "architecture": "MixtralForCausalLM", "num_kv_heads": 4, "mlp_dim": 32,
            "experts": ExpertsConfig(num_experts=5, num_experts_per_token=2, expert_dim=32, normalises_weights=True),
        },
        (4, 8),
    ),
    "mixture and windows in some layers, norms of heads": (
        WIDE | {
            "architecture": "Qwen3MoeForCausalLM", "num_kv_heads": 2, "num_layers": 3, "windows": (None, 9, 9),
            "experts": ExpertsConfig(
                num_experts=6, num_experts_per_token=3, expert_dim=16, normalises_weights=False, dense_layers=(1,)
            ),
        },
        (8,),
    ),
    "windows in every other layer, soft caps": (
        WIDE | {
            "architecture": "Gemma2ForCausalLM", "num_kv_heads": 4, "num_layers": 3, "windows": (9, None, 9),
            "activation": "gelu_tanh",
            "extras": Gemma2Extras(query_pre_attn_scalar=7.0, attention_soft_cap=2.0, logit_soft_cap=3.0),
        },
        (4,),
    ),
    "norms of all heads": (WIDE | {"architecture": "Olmo2ForCausalLM", "num_kv_heads": 2}, (4,)),
}  # fmt: skip
"""What differs from a tiny Llama, and on how many devices beside one. The vocabulary of 199 is cut by none."""
PARAMS = (
    SamplingParams(temperature=0, max_tokens=16, logprobs=2),
    SamplingParams(temperature=0.8, seed=7, n=2, max_tokens=12, logprobs=0),
)


def give(case: str, num_devices: int) -> dict[str, Any]:
    """Tokens and log-probabilities of some requests in a pool so small that blocks are swapped."""
    model = tiny_model(seed=5, **CASES[case][0])
    num_blocks = 13 if model[1].windows is None else 26  # a block is of one group of layers
    engine = make_engine(
        model, tensor_parallel_size=num_devices, num_device_blocks=num_blocks, max_num_seqs=4,
        max_num_batched_tokens=16, batch_invariant=True,  # one shape to compile
    )  # fmt: skip
    prompts = random_prompts(2, (21, 5, 33))
    made = run(engine, prompts, [PARAMS[0], PARAMS[1], PARAMS[0]])
    kv = jax.tree.leaves(engine.runner._kv)
    return {
        "token_ids": made.token_ids,
        "logprobs": made.logprobs,
        "num_swapped_out_blocks": made.stats.num_swapped_out_blocks,
        "windows_of_cache": engine.runner.shapes.groups.windows,
        "num_devices_of_cache": len(kv[0].sharding.device_set),
        "bytes_of_cache": sum(leaf.addressable_shards[0].data.nbytes for leaf in kv),
    }


if __name__ == "__main__":
    print(json.dumps({case: {n: give(case, n) for n in (1, *CASES[case][1])} for case in sys.argv[1:]}))
