"""The benches of a model of the user's: numbers worked by hand, and runs of the demo model without a peer."""

import json

import pytest

from bench import latency, throughput
from tests.bench.test_compare import direction


def test_latencies_are_those_of_the_runs():
    """Two rows of 5 tokens: the later first token after 1 s, the rest in 4 steps."""
    replies = [{"elapsed_s": total, "first_token_s": [0.5, 1.0]} for total in (3.0, 5.0, 9.0)]
    found = latency.summarize(replies, batch_size=2, output_len=5)
    assert (found["avg_latency"], found["percentiles"]["50"], found["latencies"]) == (17 / 3, 5.0, [3.0, 5.0, 9.0])
    assert found["first_token_ms"]["median"] == 1000
    assert found["decode_step_ms"]["median"] == 1000
    assert found["output_tokens_per_s"] == 10 / 5.0
    assert latency.summarize(replies, batch_size=2, output_len=1)["decode_step_ms"] is None


def test_rates_are_of_the_median_run():
    host = {"num_steps": 10, "host_s": 0.02}
    found = throughput.summarize([{"elapsed_s": seconds, "host": host} for seconds in (2.0, 4.0, 5.0)], 300, 100, 8)
    assert (found["elapsed_time"], found["requests_per_second"], found["tokens_per_second"]) == (4.0, 2.0, 100.0)
    assert found["output_tokens_per_s"] == {"median": 25.0, "min": 20.0, "max": 50.0, "num_runs": 3}
    assert found["host_ms_per_step"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("bench", "flags", "numbers"),
    [
        (latency, ["--batch-size", "2", "--input-len", "8", "--output-len", "4", "--num-iters", "2",
                   "--num-iters-warmup", "1"], {"batch_size": 2, "num_iters": 2}),
        (throughput, ["--lengths", "fixed", "--input-len", "8", "--output-len", "4", "--num-prompts", "3", "--repeats",
                      "1"], {"num_requests": 3, "num_output_tokens": 12, "total_num_tokens": 36}),
    ],
)  # fmt: skip
def test_a_bench_runs_on_a_model_folder_without_a_peer(bench, flags, numbers, capsys, tmp_path):
    output = tmp_path / "result.json"
    assert bench.main([*flags, "--quiet", "--max-model-len", "64", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result.items() >= (numbers | {"model": "demo", "max_model_len": 64, "dtype": "bfloat16"}).items()
    assert result["num_compiles_after_warmup"] == 0
    assert result["versions"]["jax"]
    assert {"commit", "device", "command", "host"} <= set(result)


def test_prompts_of_a_file_are_tokenized(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "To be, or not to be"}\n{"prompt": "' + "long " * 200 + '"}\n')
    args = throughput.parse(["--dataset", str(path), "--output-len", "5", "--num-prompts", "2"])
    prompts, max_tokens = throughput.make_requests(args, {"max_model_len": 64, "vocab_size": 1024})
    assert max_tokens == [5, 5]
    assert prompts[0] == prompts[1]  # the long one does not fit
    assert 5 < len(prompts[0]) < 20


def test_a_batch_that_cannot_run_at_once_is_refused():
    with pytest.raises(ValueError, match="at most 2 sequences run at once; give --max-num-seqs 3 too"):
        latency.main(["--batch-size", "3", "--max-num-seqs", "2", "--quiet"])


@pytest.mark.parametrize("bench", [latency, throughput])
def test_wrong_numbers_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--input-len", "0"])
    assert "must be 1 or more" in capsys.readouterr().err


def test_what_the_benches_report_is_known_to_compare():
    for name in ("avg_latency", "first_token_ms.median", "decode_step_ms.median", "load_s", "compile_s"):
        assert direction(name.split(".")) is False
    for name in ("output_tokens_per_s.median", "requests_per_second", "tokens_per_second"):
        assert direction(name.split(".")) is True
