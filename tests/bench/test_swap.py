"""The swap bench runs, and says of itself what a result must say."""

import json
from pathlib import Path

import pytest

from bench import swap


@pytest.mark.parametrize("pool", ["auto", "pinned"])
def test_every_size_gets_a_rate_each_way(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "CEILING_BYTES", 2**20)
    output = tmp_path / "swap.json"
    arguments = ["--shape", "tiny", "--num-blocks", "1", "5", "--staging", "2", "4", "--repeats", "2", "--pool", pool]
    assert swap.main([*arguments, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(output.read_text())
    assert result["bench"] == "swap"
    assert {"date", "command", "commit", "device", "jax"} <= set(result)
    # tiny: 2 layers of 2 heads of 16, keys and values, 16 tokens, 2 bytes each
    assert result["block_bytes"] == 2 * 2 * 2 * 16 * 16 * 2
    assert [(row["staging"], row["num_blocks"], row["way"]) for row in result["rows"]] == [
        (staging, num, way) for staging in (2, 4) for num in (1, 5) for way in ("out", "in")
    ]
    for row in result["rows"]:
        assert row["bytes_per_s"] == pytest.approx(row["num_blocks"] * result["block_bytes"] / row["ms"] * 1e3)
        link = result["ceilings_bytes_per_s"][f"link_{row['way']}"]
        assert row["fraction_of_link"] == pytest.approx(row["bytes_per_s"] / link)
    assert len(lines) == 2 + 8 + 1


def test_wrong_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        swap.main(["--num-blocks", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
