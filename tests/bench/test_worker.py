"""Worker processes: calls answered, errors told, and a death that says its reason."""

import sys
from pathlib import Path

import pytest

from bench.worker import Worker, WorkerError, peak_memory_bytes


def test_a_worker_answers_and_tells_its_errors_and_lives_on(tmp_path: Path):
    with Worker(sys.executable, "tests.bench.echo_worker", tmp_path / "log") as worker:
        assert worker.versions == {"echo": "1"}
        assert worker.call("echo", value=[1, "two"]) == [1, "two"]
        with pytest.raises(WorkerError, match="ValueError: no value is not allowed"):
            worker.call("fail")
        assert worker.call("echo", value=2) == 2
    assert "printed by a library" in (tmp_path / "log").read_text()


def test_a_worker_that_cannot_start_says_why(tmp_path: Path):
    with pytest.raises(WorkerError, match="No module named bench.no_such_worker"):
        Worker(sys.executable, "bench.no_such_worker", tmp_path / "log")
    with pytest.raises(WorkerError, match="cannot start no-such-python"):
        Worker("no-such-python", "bench.ceilings", tmp_path / "log")


def test_peak_memory_is_of_this_process_and_plausible():
    assert 2**20 < peak_memory_bytes() < 2**40
