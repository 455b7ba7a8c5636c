"""A start is cut into parts that add up, and a cold one compiles what a warm one reads."""

import json

import pytest

from bench.startup import main, summarize, with_sums

PARTS = {"interpreter_s": 0.1, "imports_s": 1.0, "device_s": 0.5, "load_s": 2.0, "engine_s": 0.4, "compile_s": 6.0,
         "first_token_s": 0.25}  # fmt: skip


def test_parts_add_up_to_ready_and_to_the_first_token():
    parts = with_sums(PARTS)
    assert parts["ready_s"] == pytest.approx(10.0)
    assert parts["total_s"] == pytest.approx(10.25)
    assert list(parts)[-2:] == ["first_token_s", "total_s"]


def test_medians_are_of_each_part_and_extremes_of_the_whole():
    runs = [{"parts": with_sums(PARTS | {"compile_s": seconds})} for seconds in (6.0, 1.0, 2.0)]
    found = summarize(runs)
    assert (found["compile_s"], found["num_runs"]) == (2.0, 3)
    assert (found["min_total_s"], found["max_total_s"]) == (pytest.approx(5.25), pytest.approx(10.25))


@pytest.mark.slow
def test_a_cold_start_compiles_and_a_warm_one_reads(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "given"))  # which would make a cold start warm
    output = tmp_path / "result.json"
    assert main(["--repeats", "1", "--quiet", "--max-model-len", "128", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["cold"]["compile_s"] > 1.5 * result["warm"]["compile_s"] > 0
    assert all(seconds >= 0 for kind in ("cold", "warm") for seconds in result["runs"][kind][0].values())
    assert (result["model"], result["engine_options"]) == ("demo", {"max_model_len": 128})
    assert not (tmp_path / "given").exists()


def test_what_no_engine_takes_is_refused_before_a_start():
    with pytest.raises(ValueError, match="is not a folder"):
        main(["--model", "/nowhere"])
    with pytest.raises(ValueError, match="block_size"):
        main(["--block-size", "-1"])
