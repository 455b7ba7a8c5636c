"""Two results are compared metric by metric; what is better is known from names; unlike runs are never judged."""

import json

import pytest

from bench.compare import Change, bench_of, compare, direction, flatten, main

BEFORE = {
    "bench": "serve", "date": "1", "command": "a", "commit": "x", "versions": {"jax": "1"}, "model_id": "m",
    "host": {"cpu": "c", "system": "s"}, "goodput_limits_ms": {"ttft": 5.0}, "output_throughput": 100.0,
    "p99_ttft_ms": 50.0, "std_ttft_ms": 1.0, "failed": 0, "mean_tpot_ms": None, "client": {"cpu_s": 1.0},
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    def write(**changes):
        (tmp_path / "a.json").write_text(json.dumps(BEFORE))
        (tmp_path / "b.json").write_text(json.dumps(BEFORE | changes))
        return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]

    return write


@pytest.mark.parametrize(
    ("path", "is_high_good"),
    [
        ("output_throughput", True), ("request_goodput", True), ("completed", True), ("tokens_per_second", True),
        ("shapes.0.throughput.engine_tokens_per_s.median", True), ("tokens_per_s.width-4", True),
        ("rows.0.load_bytes_per_s", True), ("rows.3.saved", True), ("p99_itl_ms", False), ("failed", False),
        ("avg_latency", False), ("percentiles.99", False), ("seconds.width-4.median", False),
        ("decode_ms.64", False), ("us_per_beam_and_token.4", False), ("engine.peak_memory_bytes", False),
        ("host_ms_per_step", False), ("cold.compile_s", False), ("engine.num_compiles_after_warmup", False),
        ("num_prompts", None), ("seed", None), ("goodput_limits_ms.ttft", None), ("bar_s", None),
        ("throughput.num_requests", None), ("engine_tokens_per_s.num_things", None), ("weight_bytes", None),
        ("max_model_len", None), ("request_rate", None), ("tokens_per_chunk", None),
    ],
)  # fmt: skip
def test_a_name_says_what_is_good(path, is_high_good):
    assert direction(path.split(".")) is is_high_good


def test_changes_are_ratios_with_a_direction():
    """100 to 80 tokens a second is 1.25 times worse; 50 to 40 ms is 1.25 times better."""
    changes, differing = compare(BEFORE, BEFORE | {"output_throughput": 80.0, "p99_ttft_ms": 40.0, "commit": "y"})
    found = {change.name: change for change in changes}
    assert found["output_throughput"].worsening == pytest.approx(1.25)
    assert found["output_throughput"].verdict == "1.25x worse"
    assert found["p99_ttft_ms"].verdict == "1.25x better"
    assert (found["failed"].verdict, found["client.cpu_s"].is_judged, found["std_ttft_ms"].is_judged) == (
        "same", False, False
    )  # fmt: skip
    assert "mean_tpot_ms" not in found
    assert differing == {"commit": ("x", "y")}


@pytest.mark.parametrize(("before", "after", "is_high_good", "verdict"), [
    (0, 0, False, "same"), (0, 3, False, "worse, from or to 0"), (3, 0, False, "better, from or to 0"),
    (3, 0, True, "worse, from or to 0"), (0, 3, True, "better, from or to 0"), (1000, 1005, True, "same"),
])  # fmt: skip
def test_a_zero_has_a_verdict_too(before, after, is_high_good, verdict):
    change = Change(name="x", before=before, after=after, is_high_good=is_high_good, is_judged=True)
    assert change.verdict == verdict


def test_repeats_are_compared_by_their_median():
    (change,), _ = compare({"bench": "steps", "decode_ms": {"8": [1.0, 9.0, 2.0]}},
                           {"bench": "steps", "decode_ms": {"8": [3.0]}})  # fmt: skip
    assert (change.name, change.before, change.after) == ("decode_ms.8", 2.0, 3.0)
    assert dict(flatten({"a": [{"b": 1}, {"b": [1, 2]}]})) == {("a", "0", "b"): 1, ("a", "1", "b"): [1, 2]}


def test_results_of_two_benches_are_refused():
    with pytest.raises(ValueError, match="two benches, serve and latency"):
        compare(BEFORE, BEFORE | {"bench": "latency"})
    with pytest.raises(ValueError, match="no metric in common"):
        compare({"bench": "x", "a": 1}, {"bench": "x", "a": 1})
    assert bench_of({"request_throughput": 1.0, "mean_ttft_ms": 2.0}) == "serve"  # as vLLM writes it


@pytest.mark.parametrize(
    ("changes", "flags", "code"),
    [
        ({"output_throughput": 80.0}, [], 0),
        ({"output_throughput": 80.0}, ["--fail-above", "1.3"], 0),
        ({"output_throughput": 80.0}, ["--fail-above", "1.2"], 1),
        ({"output_throughput": 80.0}, ["--fail-above", "1.2", "--only", "p99_*"], 0),
        ({"failed": 1}, ["--fail-above", "9"], 1),
        ({"std_ttft_ms": 9.0}, ["--fail-above", "1.2"], 0),
        ({"std_ttft_ms": 9.0}, ["--fail-above", "1.2", "--only", "std_ttft_ms"], 1),
        ({"versions": {"jax": "2"}, "commit": "y"}, ["--fail-above", "1.2"], 0),
        ({"model_id": "other"}, ["--fail-above", "1.2"], 2),
        ({"model_id": "other"}, ["--fail-above", "1.2", "--anyway"], 0),
        ({"host": {"cpu": "d", "system": "s"}}, ["--fail-above", "1.2"], 2),
        ({"model_id": "other"}, [], 0),
    ],
)
def test_the_exit_code_judges_what_can_be_judged(changes, flags, code, files, capsys):
    assert main([*files(**changes), *flags]) == code
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["exit_code"] == code
    assert ("THE RUNS DIFFER" in captured.out) == bool({"model_id", "host"} & set(changes))
    if code == 1:
        assert "worse by more than" in captured.err
        assert result["too_much_worse"]
    if code == 2:
        assert "not judged" in captured.err


def test_what_cannot_be_compared_is_refused_with_a_remedy(files, tmp_path, capsys):
    with pytest.raises(ValueError, match="--only nothing names none of"):
        main([*files(), "--only", "nothing"])
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="c.json is no JSON: give a file that a bench wrote"):
        main([str(tmp_path / "c.json"), files()[0]])
    with pytest.raises(SystemExit):
        main([*files(), "--fail-above", "0.9"])
    assert "1.1 lets a metric be 10 % worse" in capsys.readouterr().err
