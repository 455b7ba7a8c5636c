"""The bench of beam search: what it makes of its runs, and that it runs without its peer."""

import json

import pytest

from bench import beams
from bench.beams import Runs, main, make_prompts, parse, summary


def test_prompts_are_seeded_and_nearly_of_one_length():
    prompts = make_prompts(16, 128, 512, seed=0)
    assert prompts == make_prompts(16, 128, 512, seed=0) != make_prompts(16, 128, 512, seed=1)
    assert all(112 <= len(prompt) <= 144 and min(prompt) >= 3 and max(prompt) < 512 for prompt in prompts)


def test_ratios_are_of_medians_and_the_best_peer_counts():
    """2 searches of 10 tokens: 20 tokens; width 2 makes 4 rows and 40 beam tokens, width 8 makes 160."""
    runs = Runs()
    for ours, wide, slow, fast in ((1.0, 3.0, 9.0, 4.0), (2.0, 4.0, 9.0, 5.0), (9.0, 5.0, 9.0, 6.0)):
        runs.add("width-2", {"elapsed_s": ours, "token_ids": [[1, 2], [3, 4]]})
        runs.add("greedy-4", {"elapsed_s": 1.0, "token_ids": []})
        runs.add("width-8", {"elapsed_s": wide, "token_ids": []})
        runs.add("greedy-16", {"elapsed_s": 2.0, "token_ids": []})
        runs.add("transformers-width-2-batch-1", {"elapsed_s": slow, "token_ids": [[9, 9], [9, 9]]})
        runs.add("transformers-width-2-batch-2", {"elapsed_s": fast, "token_ids": [[1, 2], [3, 5]]})
    args = parse(["--num-prompts", "2", "--num-new-tokens", "10", "--widths", "2", "8"])
    result = summary(runs, args, {2: 4, 8: 16})
    assert result["best_peer"] == "transformers-width-2-batch-2"
    assert result["ratio_to_best_peer"] == 5.0 / 2.0
    assert result["tokens_per_s"]["width-2"] == 20 / 2.0
    assert result["agreement"] == {"equal_requests": 0.5, "tokens_before_first_difference": 0.75}
    assert result["us_per_beam_and_token"] == {2: pytest.approx(50_000), 8: pytest.approx(25_000)}
    assert result["cost_of_widest_to_first"] == pytest.approx(0.5)
    assert result["time_to_greedy"] == {2: 2.0, 8: 2.0}


@pytest.mark.slow
def test_it_runs_and_says_why_the_peer_did_not(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--num-prompts", "2", "--prompt-len", "16", "--num-new-tokens", "4"]
    arguments += ["--widths", "2", "3", "--repeats", "1", "--peer-python", str(tmp_path / "none")]
    arguments += ["--output", str(file)]
    assert main(arguments) == 0
    result = json.loads(file.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "cannot start" in result["peer_skipped"]
    assert result["best_peer"] is None
    assert set(result["seconds"]) == {"width-2", "greedy-4", "width-3", "greedy-6"}
    assert all(row["median"] > 0 for row in result["seconds"].values())


@pytest.mark.parametrize("arguments", [["--widths", "0"], ["--repeats", "0"], ["--prompt-len", "7"]])
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        beams.parse(arguments)
    assert "numbers must be 1 or more, and --prompt-len 8 or more" in capsys.readouterr().err
