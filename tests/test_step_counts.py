"""No change makes the engine do more for the same requests, unless it says so in `step_counts.json`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((ROOT / "tests" / "step_counts.json").read_text())
UPDATE = "python -m tests.step_counts --update"
MORE_IS_BETTER = {"num_prefix_hit_tokens", "num_generated_tokens"}
TOLERANCE = {"host_calls_per_step": 1.02, "host_lines_per_step": 1.05}
"""Upwards, of the host's own work: Python 3.12 runs up to 3 % fewer lines than 3.11. All else is exact."""


def complaints(committed, measured):
    """What is worse than it was, in words."""
    found = []
    for name, then in committed.items():
        now = measured[name]
        limit = then * TOLERANCE.get(name, 1)
        if name in MORE_IS_BETTER:
            if now < then:
                found.append(f"{name} fell from {then:g} to {now:g}")
        elif now > limit:
            found.append(f"{name} grew from {then:g} to {now:g} (allowed: {limit:g})")
    return found


@pytest.fixture(scope="module")
def measured():
    """In a process of its own: annotations checked here, and programs compiled by other tests, would be counted too."""
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", PYTHONHASHSEED="0", PYTHONPATH=str(ROOT),
        JAX_COMPILATION_CACHE_DIR=str(ROOT / ".pytest_cache" / "xla"),
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "tests.step_counts"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("workload", COMMITTED)
def test_a_step_does_no_more_than_it_did(measured, workload):
    found = complaints(COMMITTED[workload], measured[workload])
    assert not found, f"{workload}: {'; '.join(found)}. If that is meant, run `{UPDATE}` and say why in the commit."


def test_every_workload_and_count_is_guarded(measured):
    assert {name: set(counts) for name, counts in measured.items()} == {
        name: set(counts) for name, counts in COMMITTED.items()
    }, f"run `{UPDATE}`"


def test_the_workloads_meet_what_they_are_to_guard():
    assert COMMITTED["one shared prefix"]["num_prefix_hit_tokens"] > 0
    assert COMMITTED["samples of one prompt"]["num_copied_blocks"] > 0
    assert COMMITTED["swapped under pressure"]["num_swapped_blocks"] > 0
    assert COMMITTED["recomputed under pressure"]["num_preemptions"] > 0
    assert COMMITTED["recomputed under pressure"]["num_swapped_blocks"] == 0
    assert all(counts["num_compiles_after_warmup"] == 0 for counts in COMMITTED.values())
    # a plain step is one program and one transfer, that of its inputs
    assert COMMITTED["greedy"]["dispatches_per_step"] == COMMITTED["greedy"]["transfers_per_step"] == 1


def test_a_complaint_names_what_grew_and_what_fell():
    committed = {"num_steps": 10, "host_calls_per_step": 100.0, "num_prefix_hit_tokens": 40, "num_preemptions": 3}
    measured = {"num_steps": 11, "host_calls_per_step": 102.5, "num_prefix_hit_tokens": 39, "num_preemptions": 2}
    assert complaints(committed, measured) == [
        "num_steps grew from 10 to 11 (allowed: 10)",
        "host_calls_per_step grew from 100 to 102.5 (allowed: 102)",
        "num_prefix_hit_tokens fell from 40 to 39",
    ]
    assert not complaints(committed, committed | {"host_calls_per_step": 101.9, "num_steps": 9})
