"""What the examples save, in tokens that follow from their texts and the block size."""

from itertools import pairwise

import pytest

from bench.examples import chat, content, retrieval, translation
from bench.examples.saving import measure
from jaxpaged import LLM

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return LLM("demo", show_progress=False, num_device_blocks=80).get_tokenizer()


def num_common(one, other):
    """Tokens at the beginning that two prompts have in common."""
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def recorded(example):
    """The example, and the outputs of its runs with sharing."""
    runs = []

    def run(llm, is_shared):
        outputs = example(llm, is_shared)
        if is_shared:
            runs.append(outputs)
        return outputs

    return run, runs


@pytest.mark.parametrize(("example", "num"), [(retrieval.answer, 6), (translation.translate, 8)])
def test_what_stands_before_every_prompt_is_computed_once(example, num):
    run, runs = recorded(example)
    saving = measure(run, repeats=1)
    prompts = [output.prompt_token_ids for output in runs[-1]]
    assert len(prompts) == num
    # whole blocks, those found in any prompt before
    found = [
        max(num_common(prompt, earlier) for earlier in prompts[:index]) // BLOCK_SIZE * BLOCK_SIZE
        for index, prompt in enumerate(prompts) if index
    ]  # fmt: skip
    assert saving.num_tokens_not_computed == sum(found) >= (num - 1) * 64
    assert saving.num_prompt_tokens == sum(map(len, prompts))
    assert saving.blocks_saved_fraction > 0.2


def test_a_turn_of_a_chat_finds_all_that_was_said_before():
    run, runs = recorded(chat.converse)
    saving = measure(run, repeats=1)
    found = 0
    for before, turn in pairwise(runs[-1]):
        said = before.prompt_token_ids + before.outputs[0].token_ids
        assert turn.prompt_token_ids[: len(said)] == said
        found += (len(said) - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last token said was never put through the model
    assert saving.num_tokens_not_computed == found > 0


def test_drafts_compute_their_prompt_once_and_share_its_blocks(tokenizer):
    saving = measure(content.draft, repeats=1)
    num_prompt = len(tokenizer.encode(content.PROMPT))
    assert saving.num_prompt_tokens == content.NUM_DRAFTS * num_prompt
    assert saving.num_tokens_not_computed == (content.NUM_DRAFTS - 1) * num_prompt
    assert saving.blocks_saved_fraction > 0.2
    assert len(set(saving.texts)) == content.NUM_DRAFTS
    assert "prompt tokens not computed (83 %)" in saving.report()
