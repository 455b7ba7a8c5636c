"""Prompts have the length that was asked for, are seeded, and share what a trace says they share."""

import json
from itertools import pairwise

import pytest

from bench.client.prompts import BodyMaker, TokenPrompts, WordPrompts, bodies_of, load_tokenizer
from bench.plans import RequestPlan
from jaxpaged.llm import DEMO_FOLDER


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(DEMO_FOLDER))


def test_words_are_as_many_as_their_tokens_allow():
    """16 words in 37 tokens and 80 in 165: two tokens a word, and five around them."""
    prompts = WordPrompts.calibrated((37, 165))
    assert (prompts.tokens_per_word, prompts.overhead) == (2, 5)
    assert len(prompts.prompt(RequestPlan(input_len=45, output_len=1), 0, 0).split()) == 20
    assert len(prompts.prompt(RequestPlan(input_len=1, output_len=1), 0, 0).split()) == 1
    assert prompts.count("word " * 100) == pytest.approx(200, rel=0.1)
    prompts.tokens_per_char = 0.5
    assert prompts.count("12345678") == 4
    with pytest.raises(ValueError, match="counts 9 and 9 tokens"):
        WordPrompts.calibrated((9, 9))


def test_token_prompts_are_exact_and_hold_no_special_token(tokenizer):
    prompts = TokenPrompts(tokenizer)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special
    ids = prompts.prompt(RequestPlan(input_len=5000, output_len=1), 0, 0)
    assert len(ids) == 5000
    assert not special & set(ids)
    assert max(ids) < tokenizer.get_vocab_size()
    assert prompts.count("To be, or not to be") == len(tokenizer.encode("To be, or not to be").ids)


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_prompts_share_the_blocks_that_share_a_name(kind, tokenizer):
    prompts = WordPrompts() if kind == "words" else TokenPrompts(tokenizer)
    plans = [
        RequestPlan(input_len=length, output_len=1, prefix_ids=names)
        for length, names in ((1100, (7, 8, 9)), (1030, (7, 8, 4)), (500, (7,)), (600, (1, 8)), (1100, ()))
    ]
    made = [prompts.prompt(plan, 0, index) for index, plan in enumerate(plans)]
    texts = [text.split() if isinstance(text, str) else text for text in made]
    assert [len(text) for text in texts] == [1100, 1030, 500, 600, 1100]
    assert texts[0][:1024] == texts[1][:1024]
    assert texts[0][1024:1030] != texts[1][1024:]
    assert texts[2] == texts[0][:500]
    assert texts[3][:64] != texts[0][:64]
    assert texts[4][:64] != texts[0][:64]
    assert all(one != other for one, other in pairwise(texts))
    assert prompts.prompt(plans[0], 0, 0) == made[0] != prompts.prompt(plans[0], 1, 0)


def test_bodies_carry_texts_and_conversations_as_they_are():
    plans = [
        RequestPlan(input_len=1, output_len=5, text="a"),
        RequestPlan(input_len=1, output_len=6, text="b\nc", messages=(("system", "b"), ("user", "c"))),
        RequestPlan(input_len=1, output_len=7),
    ]
    for is_chat in (False, True):
        make = BodyMaker(model="m", is_chat=is_chat, extra={})
        bodies = [json.loads(body) for body in bodies_of(plans, make, lambda plan, index: f"made {index}")]
        assert [body["max_tokens"] for body in bodies] == [5, 6, 7]
        if is_chat:
            assert [len(body["messages"]) for body in bodies] == [1, 2, 1]
            assert bodies[1]["messages"] == [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
        else:
            assert [body["prompt"] for body in bodies] == ["a", "b\nc", "made 2"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json in it"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
