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
from jaxpaged.sampling_params import SamplingParams  # noqa: E402

WIDE = {"model_dim": 64, "mlp_dim": 96, "num_q_heads": 8, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": WIDE | {"num_kv_heads": 8},
    "mixture": WIDE | {
        "architecture": "MixtralForCausalLM", "num_kv_heads": 4, "mlp_dim": 32,
        "experts": ExpertsConfig(num_experts=5, num_experts_per_token=2, expert_dim=32, normalises_weights=True),
    },
    "norms of all heads": WIDE | {"architecture": "Olmo2ForCausalLM", "num_kv_heads": 2},
    "few kv heads, tied": WIDE | {"num_kv_heads": 2, "tie_embeddings": True, "attention_bias": True, "mlp_bias": True},
}
"""The vocabulary of 199 is cut by no number of devices."""
PARAMS = (
    SamplingParams(temperature=0, max_tokens=16, logprobs=2),
    SamplingParams(temperature=0.8, seed=7, n=2, max_tokens=12, logprobs=0),
)


def give(case: str, num_devices: int) -> dict[str, Any]:
    """Tokens and log-probabilities of some requests in a pool so small that blocks are swapped."""
    model = tiny_model(seed=5, **MODELS[case])
    engine = make_engine(
        model, tensor_parallel_size=num_devices, num_device_blocks=13, max_num_seqs=4, max_num_batched_tokens=16
    )
    prompts = random_prompts(2, (21, 5, 33))
    made = run(engine, prompts, [PARAMS[0], PARAMS[1], PARAMS[0]])
    kv = jax.tree.leaves(engine.runner._kv)
    return {
        "token_ids": made.token_ids,
        "logprobs": made.logprobs,
        "num_swapped_out_blocks": made.stats.num_swapped_out_blocks,
        "num_devices_of_cache": len(kv[0].sharding.device_set),
        "bytes_of_cache": sum(leaf.addressable_shards[0].data.nbytes for leaf in kv),
    }


if __name__ == "__main__":
    print(json.dumps({case: {n: give(case, n) for n in (1, 4, 8)} for case in sys.argv[1:]}))
