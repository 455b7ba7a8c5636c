"""The share of blocks that the bench reports is what block tables of these lengths share."""

import pytest

from bench.paper import sharing
from bench.paper.sharing import LENGTHS, Lengths, parse, percent_saved


def expected_percent(prompt_len: int, output_len: int, block_size: int) -> float:
    """Two samples, step by step: the prompt's full blocks are shared, and the last one until the first write."""
    fractions = [0.0]  # the prefill, by one sequence
    for num_tokens in range(prompt_len + 1, prompt_len + output_len):  # the last token is never put through the model
        named = 2 * -(-num_tokens // block_size)
        fractions.append((prompt_len // block_size) / named)
    return 100 * sum(fractions) / len(fractions)


def test_two_samples_share_the_full_blocks_of_their_prompt(monkeypatch):
    """A prompt of 40 tokens and two outputs of 20: 2 of 6 to 8 blocks are shared."""
    monkeypatch.setattr(sharing, "lognormal_lens", lambda rng, num, mean, **_: [mean] * num)
    lengths = Lengths(prompt_mean=40, output_mean=20, paper={})
    args = parse(["--num-requests", "1", "--num-requests-at-once", "1"])
    assert percent_saved("demo", lengths, "parallel sampling", 2, args) == pytest.approx(
        expected_percent(40, 20, 16), abs=1e-6
    )


@pytest.mark.slow
def test_beams_share_more_than_samples():
    args = parse(["--num-requests", "4", "--num-requests-at-once", "4"])
    saved = {method: percent_saved("demo", LENGTHS["Alpaca-like"], method, 4, args) for method in sharing.METHODS}
    assert 0 < saved["parallel sampling"] < saved["beam search"] < 75  # at most all but one of four


def test_numbers_out_of_range_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--numbers", "0"])
    assert "1 or more" in capsys.readouterr().err
