"""The workloads of shared prefixes: what is shared, how long it gets, and that sharing changes no token."""

import json

import pytest

from bench.paper.prefix import Maker, main


def test_sentences_to_translate_share_the_examples_before_them():
    turns = Maker(512, 0).translation(16, 341)
    assert len({tuple(turn.prompt[:341]) for turn in turns}) == 1
    assert len({tuple(turn.prompt[341:]) for turn in turns}) == 16
    assert all(4 <= turn.num_new_tokens <= 120 for turn in turns)
    assert sum(turn.num_new_tokens for turn in turns) / 16 == pytest.approx(30, abs=0.5)


def test_eight_questions_are_asked_about_each_text():
    turns = Maker(512, 0).retrieval(16)
    texts = [tuple(turn.prompt[:800]) for turn in turns]
    assert len(set(texts[:8])) == len(set(texts[8:])) == 1
    assert texts[0] != texts[8]


def test_a_round_of_chat_begins_with_all_that_was_said_before():
    said = []

    def answer(turns):
        said.append([[1000 + len(said)] * turn.num_new_tokens for turn in turns])
        return said[-1]

    rounds = list(Maker(512, 0).chat(4, answer))
    assert len(rounds) == 6
    for index in range(5):
        for turn, words, following in zip(rounds[index], said[index], rounds[index + 1], strict=True):
            whole = turn.prompt + words
            length = len(following.prompt) + following.num_new_tokens
            assert length <= 1024
            if length < 1024:
                assert following.prompt[: len(whole)] == whole


@pytest.mark.slow
def test_it_runs_and_sharing_changes_no_token(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--num-requests", "4", "--repeats", "1", "--output", str(file)]
    assert main(arguments) == 0
    result = json.loads(file.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["case"] for row in result["rows"]] == ["one-shot", "five-shot", "chat", "retrieval"]
    for row in result["rows"]:
        assert row["has_same_tokens"]
        assert row["gain"] > 0
        assert 0.3 < row["cached_fraction"] < 1


def test_numbers_out_of_range_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])
    assert "must be 2 or more, and --repeats 1 or more" in capsys.readouterr().err
