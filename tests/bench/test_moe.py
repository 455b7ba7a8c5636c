"""The bench of mixtures runs, agrees with dense, and says of itself what a result must say."""

import json
from pathlib import Path

import pytest

from bench import moe


def test_every_number_of_tokens_gets_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "moe.json"
    sizes = ["--num-experts", "4", "--model-dim", "8", "--expert-dim", "12"]
    arguments = [*sizes, "--tokens", "1", "9", "--repeats", "2"]
    assert moe.main([*arguments, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(output.read_text())
    assert result["bench"] == "moe"
    assert {"date", "command", "commit", "device", "jax"} <= set(result)
    assert [(row["num_tokens"], row["num_experts_hit"]) for row in result["rows"]] == [(1, 2), (9, 4)]
    for row in result["rows"]:
        assert set(row["ms"]) == {"blocks", "dense"}
        assert row["largest_difference"] < 1e-5
    assert len(lines) == 1 + 2 + 1


def test_more_experts_for_a_token_than_there_are_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        moe.main(["--num-experts", "2", "--per-token", "3"])
    assert "must not be above --num-experts 2" in capsys.readouterr().err
