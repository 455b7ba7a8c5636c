"""The memory plan: figures worked by hand, and clear words where a model does not fit."""

from types import SimpleNamespace

import pytest
from harness import TINY

from jaxpaged.config import EngineConfig
from jaxpaged.models.layer_groups import LayerGroups
from jaxpaged.runner import kv_cache
from jaxpaged.runner.kv_cache import activation_bytes, plan_memory

GIB = 2**30
DEVICE = SimpleNamespace(platform="gpu", device_kind="Made up", memory_stats=lambda: {"bytes_limit": GIB})

SILENT = SimpleNamespace(platform="gpu", device_kind="Silent", memory_stats=lambda: None)
CPU = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)


ONE_GROUP = LayerGroups((None,), 2)


def plan(*, device=DEVICE, groups=ONE_GROUP, **changes):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "host_memory_bytes": 10 * 2 * 1000} | changes
    weight_bytes = options.pop("weight_bytes", 0)
    return plan_memory(
        EngineConfig(**options), TINY, device=device, weight_bytes=weight_bytes, layer_block_bytes=1000,
        groups=groups,
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


def test_more_blocks_than_memory_are_refused_with_the_number_that_fits():
    activations = activation_bytes(TINY, num_tokens=32, num_logits=32, itemsize=4)
    most = (GIB - activations - 100) // 2000
    assert plan(num_device_blocks=most).num_device_blocks == most
    with pytest.raises(ValueError, match=rf"num_device_blocks={most + 1} .*at most {most} blocks fit"):
        plan(num_device_blocks=most + 1)


def test_a_device_that_tells_no_size_asks_for_the_flag_and_takes_it():
    with pytest.raises(ValueError, match="num_device_blocks"):
        plan(device=SILENT)
    made = plan(device=SILENT, num_device_blocks=9)
    assert made.num_device_blocks == 9
    assert "of unknown size" in made.table()


def test_more_host_memory_than_there_is_is_refused():
    with pytest.raises(ValueError, match="host_memory_bytes=.*available"):
        plan(host_memory_bytes=2**60)


def test_on_a_cpu_the_model_and_the_swapped_blocks_share_the_memory(monkeypatch):
    monkeypatch.setattr(kv_cache, "available_host_bytes", lambda: GIB)
    weights = GIB // 2
    assert plan(device=CPU, weight_bytes=weights, host_memory_bytes=GIB // 4).num_host_blocks == GIB // 4 // 2000 + 1
    with pytest.raises(ValueError, match="host_memory_bytes="):
        plan(device=CPU, weight_bytes=weights, host_memory_bytes=GIB // 2)


def test_swapping_needs_room_for_a_block():
    assert plan(host_memory_bytes=2000, preemption="swap").num_host_blocks == 2
    assert plan(host_memory_bytes=0, preemption="recompute").num_host_blocks == 1
    with pytest.raises(ValueError, match="preemption='swap' with host_memory_bytes=1,999.*recompute"):
        plan(host_memory_bytes=1999, preemption="swap")


def test_the_table_counts_the_blocks_that_hold_tokens():
    assert "32 blocks of 16 tokens" in plan().table()
    assert "512 tokens" in plan().table()


def test_the_table_names_every_part():
    table = plan().table()
    for part in ("weights", "KV cache", "activations", "host blocks", "limited by need"):
        assert part in table


def test_layers_with_windows_need_what_a_window_and_a_step_take():
    # 128 tokens are 8 columns of 16; a window of 20 and a step of 32 touch 51 tokens, 5 columns at most
    made = plan(groups=LayerGroups((None, 20), 1, ((0, 0), (1, 0))))
    assert made.block_bytes == 1000  # one layer
    assert made.blocks_per_sequence == 8 + 5
    assert made.num_device_blocks == 4 * 13 + 1
    assert "52 blocks of 16 tokens (1,000 bytes each) and the null block, 4 sequences of the greatest length" in (
        made.table()
    )
    assert "groups of 1 layers: 1 without a window, 1 with a window of 20 tokens; 13 blocks a longest" in made.table()
    assert "layer groups" not in plan().table()
