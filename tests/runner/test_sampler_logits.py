"""Each option that changes logits, against its definition written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import MAX_MODEL_LEN, LogitRow, draw, jitted_load_row, load_state, make_batch

from jaxpaged.runner import logits as logits_module
from jaxpaged.runner.logits import first_argmax, log_sum_exp, maximum, process, token_logprobs
from jaxpaged.runner.sampler import MAX_BAD_WORD_TOKENS, init_state, pack_row, state_bytes
from jaxpaged.runner.sampler_state import copy_rows, pack_row_copies
from jaxpaged.sampling_params import SamplingParams

VOCAB = 37  # not a multiple of 32, so that the last word of the allowed mask is ragged
jitted_process = jax.jit(process)


def processed(rows, **flags):
    logits, batch = make_batch(rows, len(rows), len(rows), **flags)
    return np.asarray(jitted_process(logits, load_state(rows, len(rows)), batch))


def by_definition(row: LogitRow) -> np.ndarray:
    """vLLM's order: allowed, bad words, stop ban, bias, repetition, frequency, presence; token by token."""
    params, result = row.params, row.logits.astype(np.float64)
    allowed = params.allowed_token_ids
    for token in range(len(result)):
        if allowed is not None and token not in allowed:
            result[token] = -np.inf
    for word in row.bad_words:
        before = list(word[:-1])
        if not before or list(row.output)[-len(before):] == before:
            result[word[-1]] = -np.inf
    if len(row.output) < params.min_tokens:
        for token in row.stop_ids:
            result[token] = -np.inf
    for token, bias in params.logit_bias or ():
        result[token] += bias
    for token in set(row.prompt) | set(row.output):
        result[token] = result[token] * params.repetition_penalty ** (-1 if result[token] > 0 else 1)
    for token in row.output:
        result[token] -= params.frequency_penalty
    for token in set(row.output):
        result[token] -= params.presence_penalty
    return result


PROMPT, OUTPUT = [3, 3, 9, 14, 20], [9, 9, 21, 30, 9]
CASES = {
    "allowed": {"allowed_token_ids": [0, 5, 31, 32, 36]},
    "bias": {"logit_bias": {0: 5.5, 36: -100.0, 12: 0.25}},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below one": {"repetition_penalty": 0.5},
    "min_tokens not reached": {"min_tokens": 6},
    "min_tokens reached": {"min_tokens": 5},
    "all penalties": {"presence_penalty": 0.3, "frequency_penalty": -0.4, "repetition_penalty": 1.2},
    "everything": {
        "allowed_token_ids": list(range(0, 37, 2)) + [9, 21],
        "logit_bias": {9: 3.0, 4: -3.0, 5: 50.0},
        "min_tokens": 16,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_an_option_does_what_its_definition_says(name):
    rng = np.random.default_rng(len(name))
    rows = [
        LogitRow(
            rng.normal(size=VOCAB).astype(np.float32) * 4,
            SamplingParams(**CASES[name]),
            prompt=PROMPT,
            output=OUTPUT,
            stop_ids=(2, 7, 36),
        )
    ]
    # one float32 rounding per operation
    np.testing.assert_allclose(processed(rows)[0], by_definition(rows[0]), rtol=1e-5, atol=1e-5)


BAD_WORDS = {
    "one token": ([12],),
    "two tokens that match": ([9, 4],),
    "two tokens that do not": ([8, 4],),
    "three that match": ([30, 9, 1],),
    "the whole output": ([9, 9, 21, 30, 9, 17],),
    "reaches into the prompt": ([20, 9, 9, 21, 30, 9, 18],),
    "longer than the sequence": ([1] * MAX_BAD_WORD_TOKENS,),
    "many": ([12], [9, 12], [30, 9, 5], [21, 9, 6], [0, 36]),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_a_bad_word_is_not_completed_and_the_prompt_is_not_read(name):
    logits = np.linspace(-1, 1, VOCAB, dtype=np.float32)
    row = LogitRow(logits, SamplingParams(), prompt=PROMPT, output=OUTPUT, bad_words=BAD_WORDS[name])
    np.testing.assert_array_equal(processed([row])[0], by_definition(row).astype(np.float32))


def test_a_bad_word_of_the_longest_length_is_banned():
    word = list(range(MAX_BAD_WORD_TOKENS))
    row = LogitRow(np.zeros(VOCAB, np.float32), SamplingParams(), prompt=[1], output=word[:-1], bad_words=[word])
    assert np.flatnonzero(np.isneginf(processed([row])[0])).tolist() == [word[-1]]


def test_tokens_at_and_past_the_position_do_not_count():
    params = SamplingParams(presence_penalty=1.0, repetition_penalty=2.0)
    row = LogitRow(np.ones(VOCAB, np.float32), params, prompt=[1, 2], output=[3])
    logits, batch = make_batch([row], 1, 1)
    stale = LogitRow(row.logits, params, prompt=[1, 2], output=[3, 8, 9, 10])
    got = jitted_process(logits, load_state([stale], 1), batch)
    np.testing.assert_array_equal(np.asarray(got)[0], processed([row])[0])


def test_counts_do_not_depend_on_the_chunk_of_the_history(monkeypatch):
    rng = np.random.default_rng(5)
    row = LogitRow(
        rng.normal(size=VOCAB).astype(np.float32),
        SamplingParams(frequency_penalty=0.5, repetition_penalty=1.5),
        prompt=rng.integers(0, VOCAB, 20).tolist(),
        output=rng.integers(0, VOCAB, 27).tolist(),
    )
    whole = processed([row])
    monkeypatch.setattr(logits_module, "HISTORY_CHUNK", 7)
    logits, batch = make_batch([row], 1, 1)
    chunked = jax.jit(lambda *args: process(*args))(logits, load_state([row], 1), batch)
    np.testing.assert_array_equal(np.asarray(chunked), whole)
    np.testing.assert_allclose(whole[0], by_definition(row), rtol=1e-5, atol=1e-5)


def test_a_row_without_options_keeps_its_bits_whatever_its_neighbours_ask_for():
    rng = np.random.default_rng(0)
    plain = LogitRow(rng.normal(size=VOCAB).astype(np.float32) * 1e3, SamplingParams(), prompt=PROMPT, output=OUTPUT)
    busy = LogitRow(
        plain.logits,
        SamplingParams(**CASES["everything"]),
        prompt=PROMPT,
        output=OUTPUT,
        bad_words=[[12]],
        stop_ids=[1],
    )
    np.testing.assert_array_equal(processed([plain, busy])[0], plain.logits)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 30.0]))
def test_log_probabilities_and_ranks_are_those_of_the_raw_logits(seed, scale):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(2, VOCAB)) * scale).astype(np.float32)
    ids = rng.integers(0, VOCAB, 2).astype(np.int32)
    exact = logits.astype(np.float64)
    exact = exact - exact.max(1, keepdims=True)
    exact = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    logprob, rank, top_ids, top = jax.jit(token_logprobs, static_argnums=2)(logits, ids, 5)
    # logits of up to about 100 are exact to 4e-6 in float32
    np.testing.assert_allclose(logprob, exact[[0, 1], ids], rtol=2e-6, atol=1e-5)
    assert rank.tolist() == [int((logits[i] > logits[i, ids[i]]).sum()) + 1 for i in range(2)]
    np.testing.assert_array_equal(top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(top, np.take_along_axis(exact, np.asarray(top_ids), 1), rtol=2e-6, atol=1e-5)


def test_the_integer_sum_of_a_large_vocabulary_is_exact_where_it_could_overflow_or_vanish():
    size = 262_144
    flat, peaked = np.zeros((1, size), np.float32), np.full((1, size), -20.0, np.float32)
    peaked[0, 3] = 0.0
    total = jax.jit(lambda x: log_sum_exp(x)[1])
    assert float(total(flat)[0]) == pytest.approx(np.log(size), rel=1e-7)
    # one float32 step at 1
    assert float(total(peaked)[0]) == pytest.approx(np.log1p((size - 1) * np.exp(-20.0)), abs=1.2e-7)


def test_a_target_is_reported_instead_of_the_sampled_token():
    logits = np.array([0.0, 1.0, 3.0, 2.0], np.float32)
    row = LogitRow(logits, SamplingParams(temperature=0, logprobs=2), target=1)
    output, _ = draw([row])
    exact = logits - np.log(np.exp(logits).sum())
    assert output.tokens.tolist() == [2]
    assert output.rank.tolist() == [3]
    np.testing.assert_allclose(output.logprob, exact[[1]], rtol=1e-6)
    np.testing.assert_array_equal(output.top_ids, [[2, 3, 1]])
    np.testing.assert_allclose(output.top_logprobs, exact[None, [2, 3, 1]], rtol=1e-6)


def test_the_first_of_equal_maxima_is_taken():
    scores = jnp.array([[1.0, 7.0, 7.0], [-jnp.inf, -jnp.inf, -jnp.inf]], jnp.float32)
    best, is_finite = maximum(scores)
    assert best.tolist() == [7.0, -np.inf]
    assert is_finite.tolist() == [True, False]
    assert first_argmax(scores, best).tolist() == [1, 0]


def test_the_state_takes_the_bytes_it_promises():
    state = init_state(3, MAX_MODEL_LEN, VOCAB)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == state_bytes(3, MAX_MODEL_LEN, VOCAB)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_ids": [0] * 49}, "49 tokens"),
        ({"token_ids": [VOCAB]}, "token id 37"),
        ({"token_ids": [-1]}, "token id -1"),
        ({"params": SamplingParams(logit_bias={VOCAB: 1.0})}, "token id 37 among the logit_bias"),
        ({"params": SamplingParams(allowed_token_ids=[VOCAB])}, "token id 37 among the allowed_token_ids"),
        ({"stop_token_ids": range(65)}, "65 stop tokens"),
        ({"stop_token_ids": [VOCAB]}, "token id 37 among the stop"),
        ({"bad_words_token_ids": [[1] * 17]}, "a bad word of 17 tokens"),
        ({"bad_words_token_ids": [[]]}, "a bad word of 0 tokens"),
        ({"bad_words_token_ids": [[1]] * 257}, "257 bad words"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(changed, message):
    whole = {
        "row": 0,
        "token_ids": [1],
        "params": SamplingParams(),
        "stop_token_ids": (),
        "bad_words_token_ids": (),
        "vocab_size": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
    }
    with pytest.raises(ValueError, match=message):
        pack_row(**(whole | changed))


FULL_ROW = LogitRow(
    np.zeros(VOCAB, np.float32),
    SamplingParams(**CASES["everything"]),
    prompt=PROMPT,
    output=OUTPUT,
    stop_ids=[4],
    bad_words=[[5]],
)
"""One that every table of the state holds something of."""


def test_a_row_loaded_again_forgets_what_it_held():
    new = LogitRow(np.zeros(VOCAB, np.float32), SamplingParams(), prompt=[1])
    state = load_state([FULL_ROW], 1)
    packed = pack_row(
        row=0, token_ids=[1], params=new.params, stop_token_ids=(), bad_words_token_ids=(), vocab_size=VOCAB,
        max_model_len=MAX_MODEL_LEN,
    )
    reloaded = jitted_load_row(state, packed)
    for got, wanted in zip(jax.tree.leaves(reloaded), jax.tree.leaves(load_state([new], 1)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_rows_are_copied_one_after_the_other():
    """Row 0 to 2, then 2 to 1; then row 2 to 0, which changes nothing: every row is what row 0 was."""
    arguments = ((jnp.arange(8, dtype=jnp.float32).reshape(4, 2), jnp.array([True, False, False, True])),)
    packed = pack_row_copies([(0, 2), (2, 1), (2, 0)], 3)
    state, ((numbers, switches),) = jax.jit(copy_rows)((load_state([FULL_ROW], 3), arguments), packed)
    for table, before in zip(jax.tree.leaves(state), jax.tree.leaves(load_state([FULL_ROW], 3)), strict=True):
        for row, origin in enumerate([0, 0, 0, 3]):
            np.testing.assert_array_equal(table[row], before[origin])
    assert numbers.tolist() == [[0, 1], [0, 1], [0, 1], [6, 7]]
    assert switches.tolist() == [True, True, True, True]
