"""The sampler's memory of forks: a beam's or sample's row begins as its parent's, on the device."""

from collections import Counter

import numpy as np
import pytest
from beam_reference import Reference
from harness import EOS, make_engine, random_prompts, run
from processors import PROCESSORS

from jaxpaged.runner.input_batch import RowTables
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

LENGTHS = (5, 17, 8, 30)
INVARIANT = {"batch_invariant": True, "max_num_seqs": 16, "logits_processors": PROCESSORS}
TIGHT = 19
"""Blocks of 8 tokens, the null block included: the largest of the requests and little more."""
NO_REPEATS = {"forbid_repeats": {"window": 6}}


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS, 1024)


@pytest.fixture(scope="module")
def bad_words(model, tokenizer, prompts) -> list[str]:
    """Words of two tokens that searches without them would write."""
    plain = run(make_engine(model, tokenizer), prompts, BeamSearchParams(beam_width=4, max_tokens=12))
    found = []
    for output in plain.outputs:
        for token_ids in (completion.token_ids for completion in output.outputs):
            for pair in zip(token_ids, token_ids[1:], strict=False):
                word = tokenizer.decode(pair)
                if word.strip() and "\ufffd" not in word and pair in map(tuple, tokenizer.bad_words_token_ids([word])):
                    found.append(word)
    return sorted(set(found))[:64]


@pytest.fixture(scope="module")
def mixed(bad_words) -> list:
    return [
        BeamSearchParams(beam_width=4, max_tokens=12, bad_words=bad_words, logits_processors=NO_REPEATS, logprobs=1),
        SamplingParams(
            n=3, temperature=0.9, seed=3, max_tokens=12, bad_words=bad_words, repetition_penalty=1.3, logprobs=1,
            logits_processors={"forbid_repeats": {}, "favour": {"ids": [5, 9, 77, -1], "bonus": 2.5}},
        ),
        BeamSearchParams(beam_width=5, max_tokens=12, logit_bias={9: 2.0, 30: -5.0}, early_stopping=True),
        SamplingParams(n=4, temperature=1.0, seed=4, max_tokens=12, frequency_penalty=0.7, bad_words=bad_words[:3]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def copied(model, tokenizer, prompts, mixed):
    return run(make_engine(model, tokenizer, **INVARIANT), prompts, mixed)


def facts(made) -> list:
    return [[(c.token_ids, c.score, c.logprobs) for c in output.outputs] for output in made.outputs]


def test_beams_with_bad_words_are_those_of_a_search_over_full_forwards(model, tokenizer, prompts, bad_words) -> None:
    assert len(bad_words) > 8
    banned = [tuple(word) for word in tokenizer.bad_words_token_ids(bad_words)]

    def edit(logits: np.ndarray, prompt: list[int], outputs: list[int]) -> np.ndarray:
        last = [word[-1] for word in banned if tuple(outputs[len(outputs) - len(word) + 1 :]) == word[:-1]]
        logits = logits.copy()
        logits[last] = -np.inf
        return logits

    params = BeamSearchParams(beam_width=4, max_tokens=12, bad_words=bad_words, length_penalty=0.6)
    got = run(make_engine(model, tokenizer, **INVARIANT), prompts, params)
    reference = Reference(model, EOS)
    for output, prompt in zip(got.outputs, prompts, strict=True):
        expected = reference.search(prompt, params, edit=edit)
        assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _, _ in expected]
        # float32 against a dense forward, summed in float64
        scores = [completion.score for completion in output.outputs]
        np.testing.assert_allclose(scores, [score for _, score, _ in expected], atol=1e-4)


def test_rows_that_are_copied_give_every_bit_of_rows_that_are_loaded(
    model, tokenizer, prompts, mixed, copied, monkeypatch
) -> None:
    monkeypatch.setattr(RowTables, "origin_of", lambda tables, sequence: None)
    loaded = run(make_engine(model, tokenizer, **INVARIANT), prompts, mixed)
    assert facts(loaded) == facts(copied)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_pressure_changes_no_bit(model, tokenizer, prompts, mixed, copied, preemption) -> None:
    engine = make_engine(model, tokenizer, **INVARIANT, num_device_blocks=TIGHT, preemption=preemption)
    tight = run(engine, prompts, mixed)
    assert tight.stats.num_preemptions > 0
    assert facts(tight) == facts(copied)


def test_a_request_is_loaded_once_and_a_step_copies_the_rows_of_all_its_forks_at_once(
    model, tokenizer, prompts, mixed, monkeypatch
) -> None:
    engine = make_engine(model, tokenizer, **INVARIANT)
    calls = Counter()

    def counted(name: str):
        function = getattr(engine.runner, name)

        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    for name in ("_load_row", "_load_arguments", "_copy_rows"):
        monkeypatch.setattr(engine.runner, name, counted(name))
    made = run(engine, prompts[:1], mixed[0])
    assert all(len(completion.token_ids) == 12 for completion in made.outputs[0].outputs)
    # a prompt and eleven steps of four beams, which were 45 loads of each kind
    assert (calls["_load_row"], calls["_load_arguments"]) == (1, 1)
    assert 0 < calls["_copy_rows"] <= 11
