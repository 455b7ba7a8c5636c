"""Tensor parallelism: how parameters are cut, and that a model on several devices gives what it gives on one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensor_parallel_worker import CASES

from jaxpaged import LLM
from jaxpaged.sharding import Cut, cut_heads, make_mesh

TESTS = Path(__file__).parent


def test_parts_are_cut_filled_up_and_repeated_as_their_axes_say() -> None:
    """4 devices; 2 key-value heads of 3 lanes; a vocabulary of 6, so 2 rows a device and the last one empty."""
    axes = {"q": ("q_heads", None), "down": (None, "mlp"), "k": ("kv_heads",), "table": ("vocab", None)}
    cut = Cut(4, 2, axes | {"norm": (None,)})
    array = np.arange(32).reshape(8, 4)
    np.testing.assert_array_equal(cut.part("q", array, 3), array[6:])
    np.testing.assert_array_equal(cut.part("down", array, 1), array[:, 1:2])
    assert np.shares_memory(cut.part("down", array, 1), array), "a view: no second copy on the host"
    keys = np.array([0, 1, 2, 10, 11, 12])
    assert [cut.part("k", keys, device).tolist() for device in range(4)] == [[0, 1, 2]] * 2 + [[10, 11, 12]] * 2
    assert cut.whole_shape("k", (6,)) == (12,)
    table = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(cut.part("table", table, 2), table[4:])
    np.testing.assert_array_equal(cut.part("table", table, 3), np.zeros((2, 2)))
    assert cut.whole_shape("table", (6, 2)) == (8, 2)
    assert cut.part_shape("norm", (5,)) == (5,)
    with pytest.raises(ValueError, match="tensor_parallel_size=4 does not divide 'q', whose axis 'q_heads' is 6 long"):
        cut.part_shape("q", (6, 4))


def test_heads_are_cut_or_repeated_or_refused() -> None:
    assert (cut_heads(32, 8, 4).num_q_heads, cut_heads(32, 8, 4).num_kv_heads) == (8, 2)
    assert (cut_heads(32, 2, 8).num_q_heads, cut_heads(32, 2, 8).num_kv_heads) == (4, 1)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the model's 32 query heads"):
        cut_heads(32, 8, 3)
    with pytest.raises(ValueError, match="tensor_parallel_size=4 and the model's 6 key-value heads"):
        cut_heads(24, 6, 4)


def test_more_devices_than_there_are_is_one_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=64, but jax sees 1 cpu device\(s\): lower it, or try"):
        make_mesh(64)
    with pytest.raises(ValueError, match="tensor_parallel_size=2, but jax sees 1 cpu"):
        LLM("demo", tensor_parallel_size=2, show_progress=False)
    assert make_mesh(1) is None


@pytest.fixture(scope="module")
def given() -> dict[str, dict[str, Any]]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    worker = subprocess.run(
        [sys.executable, str(TESTS / "tensor_parallel_worker.py"), *CASES],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr[-3000:]
    return json.loads(worker.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "num_devices"), [(case, num_devices) for case, (_, counts) in CASES.items() for num_devices in counts]
)
def test_several_devices_give_the_tokens_of_one(given, case: str, num_devices: int) -> None:
    one, several = given[case]["1"], given[case][str(num_devices)]
    model = CASES[case][0]
    assert several["num_devices_of_cache"] == num_devices
    assert several["num_swapped_out_blocks"] > 0, "blocks went to the host and came back"
    assert len(set(several["token_ids"][0][0])) > 2, "no model that repeats itself, whatever it computes"
    assert set(several["windows_of_cache"]) == set(model.get("windows", [None])), "windowed layers are in groups"
    assert several["token_ids"] == one["token_ids"]
    for a, b in zip(_flat(one["logprobs"]), _flat(several["logprobs"]), strict=True):
        assert abs(a - b) < 1e-4, "sums in another order"
    parts = min(num_devices, model["num_kv_heads"])
    assert several["bytes_of_cache"] * parts == one["bytes_of_cache"], "each device has its own heads only"


def _flat(logprobs: list[list[list[float]]]) -> list[float]:
    return [value for request in logprobs for completion in request for value in completion]
