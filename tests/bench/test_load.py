"""The load bench runs, and says of itself what a result must say."""

import json
from pathlib import Path

import pytest

from bench import load


def test_every_format_gets_its_rates_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "load.json"
    arguments = ["--bytes", "3e5", "--repeats", "1", "--formats", "huggingface"]
    assert load.main([*arguments, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(output.read_text())
    assert {"date", "command", "commit", "host"} <= set(result)
    assert [row["format"] for row in result["rows"]] == ["huggingface"]
    for row in result["rows"]:
        assert row["num_bytes"] >= result["weight_bytes"] >= 3e5
        assert len(row["load_bytes_per_s_all"]) == 1
        fresh = [rate for name, rate in row["read_bytes_per_s"].items() if "fresh" in name]
        assert row["fraction_of_read"] == pytest.approx(row["load_bytes_per_s"] / max(fresh))
        assert row["peak_bytes"] > 0
    assert len(lines) == 2 + 1 + 1


def test_the_checkpoint_has_the_bytes_that_were_asked_for() -> None:
    config = load.config_of(2e9, "bfloat16")
    assert 2e9 <= load.weight_bytes(config) < 2.2e9
    # one layer: 2 * 2048 * (2048 + 512) + 3 * 2048 * 8192 + 2 * 2048 parameters
    assert config.num_layers == -(-(10**9 - 32_000 * 2048 - 2048) // 60_821_504)


def test_wrong_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(["--repeats", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
