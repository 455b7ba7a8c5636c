"""The sampler as a whole: what it draws, that rows are strangers to each other, and what a plain step skips."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_rows import LogitRow, draw, draw_many, jitted_sample, load_state, make_batch

from jaxpaged.runner.logits import maximum
from jaxpaged.runner.noise import gumbel_noise, sampling_keys, threefry
from jaxpaged.runner.sampler import sample
from jaxpaged.sampling_params import SamplingParams

VOCAB = 301  # above NUM_CANDIDATES, so that truncated rows can be narrow or not
SMALL = 8


def random_logits(seed, scale=3.0, size=VOCAB):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


GREEDY = SamplingParams(temperature=0)
EVERY_KIND = {
    "greedy": SamplingParams(temperature=0, logprobs=3),
    "random": SamplingParams(temperature=0.7, logprobs=3),
    "hot": SamplingParams(temperature=100.0),
    "top_k": SamplingParams(top_k=5, temperature=1.3),
    "wide top_k": SamplingParams(top_k=290, temperature=5.0),
    "top_p": SamplingParams(top_p=0.8, logprobs=1),
    "wide top_p": SamplingParams(top_p=0.97, temperature=9.0),
    "min_p": SamplingParams(min_p=0.1, temperature=2.0),
    "penalties": SamplingParams(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2, temperature=0.9),
    "bias": SamplingParams(logit_bias={3: 4.0, 300: -5.0}, temperature=0),
    "allowed": SamplingParams(allowed_token_ids=[1, 64, 300]),
    "min_tokens": SamplingParams(min_tokens=9, temperature=0.5),
    "bad words": SamplingParams(temperature=0.5),
}


def every_kind():
    rng = np.random.default_rng(8)
    return [
        LogitRow(
            random_logits(i),
            params,
            prompt=rng.integers(0, VOCAB, 1 + i).tolist(),
            output=rng.integers(0, VOCAB, i).tolist(),
            stop_ids=[2, 5],
            bad_words=[[int(np.argmax(random_logits(i)))], [1, 2]] if name == "bad words" else (),
            seed=1000 + i,
        )
        for i, (name, params) in enumerate(EVERY_KIND.items())
    ]


def assert_same_row(got, index, wanted, wanted_index):
    for name, array in vars(got).items():
        np.testing.assert_array_equal(array[index], getattr(wanted, name)[wanted_index], err_msg=name)


# ---- a row and its company


@pytest.mark.parametrize("num_logit_rows", [16, 32])
def test_a_row_gives_the_same_bits_alone_and_in_company_in_any_bucket_and_any_order(num_logit_rows):
    rows = every_kind()
    order = np.random.default_rng(num_logit_rows).permutation(len(rows))
    together, _ = draw([rows[i] for i in order], num_logit_rows, any_logprobs=True)
    for place, i in enumerate(order):
        # in a bucket of one, then in one of four
        for bucket in (1, 4):
            alone, _ = draw([rows[i]], bucket, any_logprobs=True)
            assert_same_row(together, place, alone, 0)


def test_stages_that_no_row_needs_change_nothing():
    rows = [LogitRow(random_logits(i), SamplingParams(temperature=t), seed=i) for i, t in enumerate([0, 1.0, 0.3])]
    every_flag = dict.fromkeys(
        ("any_truncation", "any_penalty", "any_bias", "any_allowed", "any_bad_words", "any_ban"), True
    )
    skipped, _ = draw(rows, any_logprobs=True)
    run, _ = draw(rows, any_logprobs=True, **every_flag)
    for i in range(len(rows)):
        assert_same_row(skipped, i, run, i)


@pytest.mark.parametrize("trouble", [np.nan, np.inf])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_row_that_is_not_finite_is_flagged_and_its_neighbours_do_not_notice(kind, trouble):
    rows = every_kind()
    names = list(EVERY_KIND)
    sick = names.index(kind)
    well, _ = draw(rows, any_logprobs=True)
    logits = rows[sick].logits.copy()
    logits[7] = trouble  # not among the allowed: a ban must not hide it
    rows[sick] = dataclasses.replace(rows[sick], logits=logits)
    got, _ = draw(rows, any_logprobs=True)
    assert got.finite.tolist() == [i != sick for i in range(len(rows))]
    assert 0 <= got.tokens[sick] < VOCAB
    for i in range(len(rows)):
        if i != sick:
            assert_same_row(got, i, well, i)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_every_token_is_banned_is_flagged(temperature):
    banned = LogitRow(
        random_logits(0),
        SamplingParams(allowed_token_ids=[4], temperature=temperature, min_tokens=1),
        stop_ids=[4],
    )
    fine = LogitRow(random_logits(1), SamplingParams(temperature=temperature))
    nothing = LogitRow(np.full(VOCAB, -np.inf, np.float32), SamplingParams(temperature=temperature))
    output, _ = draw([fine, banned, nothing])
    assert output.finite.tolist() == [True, False, False]
    assert output.tokens[0] == draw([fine])[0].tokens[0]


def test_minus_infinity_is_an_ordinary_logit():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[10, 20]] = [0.0, 1.0]
    for params in (GREEDY, SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=9)):
        output, _ = draw([LogitRow(logits, params, seed=s) for s in range(32)], any_logprobs=True)
        assert output.finite.all()
        assert set(output.tokens.tolist()) <= {10, 20}
        assert np.isfinite(output.logprob).all()


# ---- greedy and random rows


def test_greedy_rows_take_the_first_maximum_of_the_processed_logits():
    logits = random_logits(4)
    best, second = np.argsort(-logits)[:2]
    params = SamplingParams(temperature=0, logit_bias={int(best): -100.0}, top_k=3, top_p=0.2)
    random_row = LogitRow(logits, SamplingParams(top_p=0.5))
    output, _ = draw([LogitRow(logits, GREEDY), LogitRow(logits, params), random_row])
    assert output.tokens[:2].tolist() == [best, second]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.001])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = random_logits(5, size=SMALL)
    tokens = draw_many(LogitRow(logits, SamplingParams(temperature=temperature)))
    assert set(tokens.tolist()) == {int(np.argmax(logits))}


DISTRIBUTIONS = {
    "plain": ({}, lambda p: p),
    "temperature": ({"temperature": 0.5}, lambda p: p**2),
    "top_k": ({"top_k": 3}, lambda p: p * (p >= np.sort(p)[-3])),
    "top_p": ({"top_p": 0.7}, lambda p: p * (p >= np.sort(p)[::-1][np.argmax(np.cumsum(np.sort(p)[::-1]) >= 0.7)])),
    "min_p": ({"min_p": 0.3}, lambda p: p * (p >= 0.3 * p.max())),
    "bias": ({"logit_bias": {2: 1.0}}, lambda p: p * np.where(np.arange(SMALL) == 2, math.e, 1.0)),
    "allowed": ({"allowed_token_ids": [1, 2, 6]}, lambda p: p * np.isin(np.arange(SMALL), [1, 2, 6])),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sampled_frequencies_follow_the_distribution(name):
    options, change = DISTRIBUTIONS[name]
    logits = random_logits(21, scale=1.0, size=SMALL)
    weights = np.exp(logits.astype(np.float64))
    wanted = change(weights / weights.sum())
    wanted = wanted / wanted.sum()
    tokens = draw_many(LogitRow(logits, SamplingParams(**options)))
    counts = np.bincount(tokens, minlength=SMALL)
    assert not counts[wanted == 0].any()
    expected = wanted[wanted > 0] * len(tokens)
    chi_square = float(((counts[wanted > 0] - expected) ** 2 / expected).sum())
    # 7 degrees of freedom at most; 29.9 is passed once in 10,000 tries, and the seeds are fixed
    assert chi_square < 29.9


def test_the_noise_is_gumbel_in_body_and_tail():
    keys = np.random.default_rng(0).integers(0, 2**32, (64, 2), dtype=np.uint32)
    ids = np.broadcast_to(np.arange(4096, dtype=np.int32), (64, 4096))
    noise = np.asarray(jax.jit(gumbel_noise)(keys, ids)).astype(np.float64).ravel()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)  # 4 standard errors of 262,144 draws
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert (noise > 8).mean() == pytest.approx(1 - math.exp(-math.exp(-8)), rel=0.5)  # 88 of 262,144
    assert np.isfinite(noise).all()


def test_the_key_is_that_of_the_contract():
    row = LogitRow(random_logits(0), SamplingParams(), prompt=[1, 2], output=[3], seed=77, sample_index=5)
    _, batch = make_batch([row], 1, 1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(77, impl="threefry2x32"), 5), 3)
    np.testing.assert_array_equal(sampling_keys(batch)[0], jax.random.key_data(key))
    first, second = threefry(tuple(jax.random.key_data(key)), jnp.arange(VOCAB, dtype=jnp.uint32))
    # by element, whatever the shape asked for: jax's default, named because it is not jax's only one
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(first ^ second, jax.random.bits(key, (VOCAB,)))


@settings(max_examples=20, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 63))
def test_every_bit_of_the_seed_matters_and_the_same_seed_repeats(seed, bit):
    rows = [
        LogitRow(np.zeros(VOCAB, np.float32), SamplingParams(), output=[0] * position, seed=s, sample_index=0)
        for s in (seed, seed, seed ^ (1 << bit))
        for position in range(8)
    ]
    tokens = draw(rows)[0].tokens.reshape(3, 8)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] != tokens[2]).any()


def test_samples_and_positions_have_noise_of_their_own():
    flat = np.zeros(VOCAB, np.float32)
    by_sample = draw([LogitRow(flat, SamplingParams(), sample_index=i, seed=1) for i in range(16)])[0].tokens
    by_position = draw([LogitRow(flat, SamplingParams(), output=[0] * i, seed=1) for i in range(16)])[0].tokens
    # 16 draws of 301 equally likely tokens: about 0.4 collisions are expected
    assert len(set(by_sample.tolist())) > 12
    assert len(set(by_position.tolist())) > 12
    assert by_sample[0] == by_position[0]


# ---- the history


def test_the_sampled_token_is_written_at_its_position_and_nowhere_else():
    rows = [LogitRow(random_logits(i), GREEDY, prompt=[9] * (i + 1), output=[8]) for i in range(3)]
    before = load_state(rows, 16)
    output, after = draw(rows, 16)
    wanted = np.asarray(before.history).copy()
    for i in range(3):
        wanted[i, i + 2] = output.tokens[i]
    # the last row takes the writes of padding
    np.testing.assert_array_equal(np.asarray(after.history)[:-1], wanted[:-1])


def test_penalties_of_the_next_step_see_the_token_that_never_left_the_device():
    logits = random_logits(3)
    row = LogitRow(logits, SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0), prompt=[1])
    state, seen = load_state([row], 1), []
    for position in range(1, 12):
        columns, batch = make_batch([row], 1, 1)
        batch = dataclasses.replace(batch, position=jnp.array([position], jnp.int32))
        output, state = jitted_sample(columns, state, batch, 3)
        seen.append(int(output.tokens[0]))
    wanted, left = [], logits.astype(np.float32).copy()
    for _ in range(11):
        token = int(np.argmax(left))
        left[token] -= np.float32(2.0) if token in wanted else np.float32(4.0)
        wanted.append(token)
    assert seen == wanted
    assert len(set(seen)) > 1


# ---- what a plain step skips


def primitives(jaxpr, is_inside_cond=False):
    """(name of a primitive, whether it stands inside a cond), all the way down."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, is_inside_cond
        inside = is_inside_cond or equation.primitive.name == "cond"
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner, inside)


def test_sorting_noise_and_counting_stand_only_inside_conditions():
    logits, batch = make_batch([LogitRow(random_logits(0), GREEDY)], 4, 4)
    state = load_state([LogitRow(random_logits(0), GREEDY)], 4)
    found = list(primitives(jax.make_jaxpr(sample, static_argnums=3)(logits, state, batch, 3).jaxpr))
    dear = {"sort", "top_k", "shift_right_logical", "exp", "log", "log1p", "while", "scan", "cumsum", "scatter-add"}
    assert dear & {name for name, inside in found if inside} >= {"top_k", "shift_right_logical", "exp", "scatter-add"}
    assert not dear & {name for name, inside in found if not inside}
    assert not {"sort", "argmax"} & {name for name, _ in found}


@pytest.mark.parametrize("size", [8, 301, 4000])
@pytest.mark.parametrize("num_rows", [1, 13, 16])
def test_a_nan_is_seen_wherever_it_stands_and_however_the_maximum_is_vectorised(size, num_rows):
    logits = np.random.default_rng(size).normal(size=(num_rows, size)).astype(np.float32)
    check = jax.jit(lambda x: maximum(x)[1])
    for column in (0, 3, size // 2, size - 1):
        sick = logits.copy()
        sick[num_rows // 2, column] = np.nan
        assert np.asarray(check(sick)).tolist() == [row != num_rows // 2 for row in range(num_rows)]
    assert np.asarray(check(logits)).all()


def test_a_plain_greedy_step_takes_the_branch_without_any_work():
    logits, batch = make_batch([LogitRow(random_logits(0), GREEDY)], 4, 4)
    state = load_state([LogitRow(random_logits(0), GREEDY)], 4)
    # poison what the stages would read: a step that ran one of them would show it
    state = dataclasses.replace(
        state,
        allowed=jnp.zeros_like(state.allowed),
        bias_ids=jnp.zeros_like(state.bias_ids),
        bias_values=jnp.full_like(state.bias_values, np.nan),
    )
    output, _ = jitted_sample(logits, state, batch, 3)
    assert output.tokens[0] == np.argmax(logits[0])
    assert np.asarray(output.finite).all()
    assert not np.asarray(output.top_logprobs).any()


# ---- every draw, and every parameter of it, from its definition


def drawn_by_definition(row: LogitRow) -> tuple[int, float]:
    """(token, margin to the next best) of a random row: float64, a sort, and the noise of jax's own generator."""
    params = row.params
    logits = row.logits.astype(np.float64)
    for token, bias in params.logit_bias or ():
        logits[token] += bias
    if params.allowed_token_ids is not None:
        logits[~np.isin(np.arange(len(logits)), params.allowed_token_ids)] = -np.inf
    scaled = logits / params.temperature
    weights = np.exp(scaled - scaled.max())
    keep = weights >= params.min_p
    if params.top_k:
        keep &= scaled >= np.sort(np.where(keep, scaled, -np.inf))[-params.top_k]
    if params.top_p < 1:
        share = np.where(keep, weights, 0)
        order = np.argsort(-share)
        running = np.cumsum(share[order]) / share.sum()
        keep[order[int(np.argmax(running >= params.top_p)) + 1 :]] = False
    key = jax.random.key(row.seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, row.sample_index), len(row.prompt) + len(row.output))
    with jax.threefry_partitionable(True):
        bits = np.asarray(jax.random.bits(key, (len(logits),))).astype(np.float64)
    uniform = np.clip(bits / 2.0**32, 2.0**-33, 1 - 2.0**-24)
    scores = np.where(keep, scaled - scaled.max() - np.log(-np.log1p(-uniform)), -np.inf)
    best, second = np.argsort(-scores)[:2]
    return int(best), float(scores[best] - scores[second])


DRAWN = {
    "temperature": {"temperature": 1.7},
    "cold": {"temperature": 0.2},
    "top_k": {"top_k": 12, "temperature": 2.0},
    "top_p": {"top_p": 0.6, "temperature": 2.0},
    "min_p": {"min_p": 0.2, "temperature": 2.0},
    "logit_bias": {"logit_bias": {7: 4.0, 11: -4.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, VOCAB, 3))},
    "all": {"temperature": 3.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "logit_bias": {5: 6.0}},
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_draw_is_the_one_its_definition_gives(name):
    rows = [
        LogitRow(
            random_logits(i), SamplingParams(**DRAWN[name]), prompt=[1] * (i % 3), output=[2] * (i % 5), seed=1000 + i,
            sample_index=i % 4,
        )
        for i in range(16)
    ]
    tokens = draw(rows)[0].tokens
    wanted = [drawn_by_definition(row) for row in rows]
    assert len({token for token, _ in wanted}) > 4
    for token, (expected, margin) in zip(tokens.tolist(), wanted, strict=True):
        assert token == expected or margin < 1e-4  # float32 may decide a near-tie the other way


PENALISED = {
    "presence": ({"presence_penalty": 1.0}, lambda logits: logits - np.isin(np.arange(SMALL), [1, 4])),
    "frequency": ({"frequency_penalty": 0.5}, lambda logits: logits - 0.5 * np.bincount([1, 1, 4], minlength=SMALL)),
    "repetition": (
        {"repetition_penalty": 1.5},
        lambda logits: np.where(
            np.isin(np.arange(SMALL), [0, 1, 4]), np.where(logits > 0, logits / 1.5, logits * 1.5), logits
        ),
    ),
    "min_tokens": ({"min_tokens": 4}, lambda logits: np.where(np.isin(np.arange(SMALL), [2, 6]), -np.inf, logits)),
    "bad_words": ({}, lambda logits: np.where(np.isin(np.arange(SMALL), [3, 5]), -np.inf, logits)),
}


@pytest.mark.parametrize("name", PENALISED)
def test_frequencies_follow_the_distribution_that_history_and_lists_leave(name):
    options, change = PENALISED[name]
    logits = random_logits(22, scale=1.0, size=SMALL)
    exact = change(logits.astype(np.float64))
    wanted = np.exp(exact - exact.max())
    wanted = wanted / wanted.sum()
    row = LogitRow(
        logits, SamplingParams(**options), prompt=[0], output=[1, 1, 4], stop_ids=[2, 6],
        bad_words=[[3], [1, 4, 5], [4, 4, 7]] if name == "bad_words" else (),
    )
    tokens = draw_many(row)
    counts = np.bincount(tokens, minlength=SMALL)
    assert not counts[wanted == 0].any()
    expected = wanted[wanted > 0] * len(tokens)
    # as above: 7 degrees of freedom at most, passed once in 10,000 tries, seeds fixed
    assert float(((counts[wanted > 0] - expected) ** 2 / expected).sum()) < 29.9
