"""What is a prompt and what is not."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.engine.prompts import MAX_PROMPTS, PromptContent, as_prompt_list, read_prompt


@pytest.mark.parametrize(
    ("prompts", "number"),
    [
        ("text", 1),
        ({"prompt": "text"}, 1),
        ([1, 2, 3], 1),
        ((1, 2, 3), 1),
        ([np.int64(1), np.int32(2)], 1),
        (np.array([1, 2, 3]), 1),
        (jnp.array([1, 2, 3]), 1),
        (np.array([[1, 2], [3, 4], [5, 6]]), 3),
        (["a", "b"], 2),
        (("a", [1, 2], {"prompt_token_ids": [3]}), 3),
        ([[1, 2]], 1),
    ],
)
def test_one_prompt_or_many(prompts, number):
    assert len(as_prompt_list(prompts)) == number


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "prompts is empty"),
        (None, "not NoneType"),
        (5, "not int"),
        ({1, 2}, "not set"),
        (b"text", "bytes are neither"),
        (["a"] * (MAX_PROMPTS + 1), "at most 1000000"),
    ],
)
def test_what_is_no_list_of_prompts(prompts, words):
    with pytest.raises(ValueError, match=words):
        as_prompt_list(prompts)


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2]), jnp.array([1, 2]), [np.int64(1), np.uint8(2)]])
def test_ids_come_in_many_forms_and_are_kept_as_plain_integers(ids):
    for prompt in (ids, {"prompt_token_ids": ids}):
        content = read_prompt(prompt)
        assert content == PromptContent(token_ids=(1, 2))
        assert all(type(token_id) is int for token_id in content.token_ids or ())


def test_text_beside_ids_is_kept_to_be_given_back():
    both = read_prompt({"prompt": "one two", "prompt_token_ids": [1, 2], "cache_salt": "tenant"})
    assert both == PromptContent(text="one two", token_ids=(1, 2), cache_salt="tenant")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "not NoneType"),
        (b"text", "bytes are neither"),
        ({"prompt_token_ids": b"text"}, "bytes are neither"),
        ({"prompt_token_ids": "12"}, "must be a list of integers"),
        ({"prompt": 5}, "a int under 'prompt'"),
        ({}, "needs a text under 'prompt' or ids"),
        ({"text": "a"}, r"unknown keys \['text'\]"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt=5 is not a string"),
        ([1, True], "id True is not an integer"),
        ([1.0, 2.0], "id 1.0 is not an integer"),
        (np.array([1.0]), "id 1.0 is not an integer"),
        ([1, "2"], "id '2' is not an integer; texts, or several prompts, go into one list that is not nested"),
        ([[1, 2], 3], r"id \[1, 2\] is not an integer; texts, or several"),
    ],
)
def test_what_is_no_prompt(prompt, words):
    with pytest.raises(ValueError, match=words):
        read_prompt(prompt)
