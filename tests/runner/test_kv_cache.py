"""The memory plan: figures worked by hand, and clear words where a model does not fit."""

from types import SimpleNamespace

import pytest
from harness import TINY

from jaxpaged.config import EngineConfig
from jaxpaged.runner.kv_cache import activation_bytes, plan_memory

GIB = 2**30
DEVICE = SimpleNamespace(platform="gpu", device_kind="Made up", memory_stats=lambda: {"bytes_limit": GIB})


def plan(**changes):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "host_memory_bytes": 10 * 2 * 1000} | changes
    weight_bytes = options.pop("weight_bytes", 0)
    return plan_memory(
        EngineConfig(**options), TINY, device=DEVICE, weight_bytes=weight_bytes, layer_block_bytes=1000,
        sampler_bytes=100, itemsize=4, max_model_len=128, num_tokens=32, num_logits=32,
    )


def test_no_more_blocks_than_all_sequences_can_use():
    made = plan()
    assert made.block_bytes == 2 * 1000  # two layers
    assert made.num_device_blocks == 4 * 8 + 1  # four sequences of 128 tokens in blocks of 16, and the null block
    assert made.limited_by == "need"
    assert made.num_host_blocks == 11
    assert made.kv_bytes == 33 * 2000


def test_what_memory_leaves_is_filled():
    activations = activation_bytes(TINY, num_tokens=32, num_logits=32, itemsize=4)
    usable = int(GIB * 0.9)
    made = plan(weight_bytes=usable - activations - 100 - 20 * 2000)
    assert made.num_device_blocks == 20
    assert made.limited_by == "memory"


def test_a_model_that_does_not_fit_is_refused_with_the_figures():
    with pytest.raises(ValueError, match=r"9 blocks of 2000 bytes.*Made up.*max_model_len"):
        plan(weight_bytes=GIB)


def test_a_number_of_blocks_given_wins():
    assert plan(num_device_blocks=7).num_device_blocks == 7
    assert plan(num_device_blocks=7).limited_by == "flag"


def test_a_device_that_tells_no_size_asks_for_the_flag():
    silent = SimpleNamespace(platform="gpu", device_kind="Silent", memory_stats=lambda: None)
    with pytest.raises(ValueError, match="num_device_blocks"):
        plan_memory(
            EngineConfig(max_num_seqs=4, max_num_batched_tokens=32), TINY, device=silent, weight_bytes=0,
            layer_block_bytes=1000, sampler_bytes=0, itemsize=4, max_model_len=128, num_tokens=32, num_logits=32,
        )


def test_the_table_names_every_part():
    table = plan().table()
    for part in ("weights", "KV cache", "activations", "host blocks", "limited by need"):
        assert part in table
