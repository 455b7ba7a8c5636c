"""min_p, top_k and top_p against their definitions, on both ways to find a threshold."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.runner.truncation import NUM_CANDIDATES, truncate

VOCAB = 41
jitted_truncate = jax.jit(truncate, static_argnames="num_candidates")


def kept(distances, min_p=0.0, top_k=0, top_p=1.0, num_candidates=NUM_CANDIDATES):
    """Which tokens of each row are left, checked to be told alike by both halves of the answer."""
    rows = len(distances)
    columns = [
        np.broadcast_to(np.asarray(value, dtype), (rows,))
        for value, dtype in ((min_p, np.float32), (top_k, np.int32), (top_p, np.float32))
    ]
    left = jitted_truncate(np.asarray(distances, np.float32), *columns, num_candidates=num_candidates)
    is_kept = np.isfinite(distances) & (np.asarray(distances, np.float32) <= np.asarray(left.threshold)[:, None])
    for row in range(rows):
        among = set(np.asarray(left.candidate_ids)[row][np.isfinite(left.candidates[row])].tolist())
        whole = set(np.flatnonzero(is_kept[row]).tolist())
        assert among == whole if left.is_narrow[row] else among < whole or len(among) == num_candidates
    return is_kept


def by_definition(distances, min_p, top_k, top_p):
    """One row; float64; the tokens that tie with the last one kept stay. Also: how near top_p was to another answer."""
    distances = np.asarray(distances, np.float64)
    weights = np.exp(-distances)
    keep = weights >= np.float32(min_p)
    if top_k:
        last = np.sort(np.where(keep, distances, np.inf))[min(top_k, len(distances)) - 1]
        keep &= distances <= last
    margin = 1.0
    if top_p < 1:
        share = weights * keep / (weights * keep).sum()
        running = np.cumsum(np.sort(share)[::-1])
        number = int(np.argmax(running >= np.float32(top_p)))
        margin = np.abs(running - np.float32(top_p)).min()
        keep &= weights >= np.sort(weights * keep)[::-1][number]
    return keep & np.isfinite(distances), margin


def random_row(seed, scale, digits):
    row = np.round(np.random.default_rng(seed).normal(size=VOCAB) * scale, digits)
    return (row - row.min()).astype(np.float32)


ROWS = st.builds(
    random_row,
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 4.0, 30.0]),
    st.sampled_from([0, 1, 6]),  # few digits make ties
)


@settings(max_examples=150, deadline=None)
@given(
    ROWS,
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0, 1, 2, 7, 40, 41, 1000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05, 1e-30]),
    st.sampled_from([1, 4, 256]),
)
def test_what_is_kept_is_what_the_definitions_say(row, min_p, top_k, top_p, num_candidates):
    wanted, margin = by_definition(row, min_p, top_k, top_p)
    near = np.abs(np.exp(-row.astype(np.float64)) - min_p).min() < 1e-6 and 0 < min_p < 1
    # where a sum meets top_p to float32's precision, either answer is right
    if margin > 1e-6 and not near:
        np.testing.assert_array_equal(kept([row], min_p, top_k, top_p, num_candidates)[0], wanted)


@settings(max_examples=60, deadline=None)
@given(st.tuples(ROWS, ROWS, ROWS), st.sampled_from([0, 1, 2, 7, 40]), st.sampled_from([1.0, 0.99, 0.7, 0.2]))
def test_both_ways_to_a_threshold_and_any_company_give_the_same_bits(rows, top_k, top_p):
    short = kept(rows, 0.0, top_k, [top_p, 1.0, 0.9], num_candidates=256)
    long = kept(rows, 0.0, top_k, [top_p, 1.0, 0.9], num_candidates=1)
    np.testing.assert_array_equal(short, long)
    np.testing.assert_array_equal(short[:1], kept(rows[:1], 0.0, top_k, top_p, num_candidates=4))


def test_worked_by_hand():
    # probabilities 0.5 0.25 0.125 0.125 and the rest nothing
    row = np.full(VOCAB, np.inf)
    row[[5, 0, 7, 40]] = np.log([1.0, 2.0, 4.0, 4.0])

    def ids(**how):
        return np.flatnonzero(kept([row], **how)[0]).tolist()

    assert ids() == [0, 5, 7, 40]
    assert ids(top_k=1) == [5]
    assert ids(top_k=2) == [0, 5]
    assert ids(top_k=3) == [0, 5, 7, 40]  # the third ties with the fourth
    assert ids(top_p=0.49) == [5]
    assert ids(top_p=0.51) == [0, 5]
    assert ids(top_p=0.76) == [0, 5, 7, 40]
    assert ids(min_p=0.4) == [0, 5]
    assert ids(min_p=0.2) == [0, 5, 7, 40]
    assert ids(top_k=2, top_p=0.66) == [5]  # of what top_k leaves, the best holds two thirds
    assert ids(min_p=0.4, top_p=0.66) == [5]


@pytest.mark.parametrize("top_p", [1e-45, 0.1, 0.9999999])
def test_the_likeliest_token_always_stays(top_p):
    row = np.full(VOCAB, 200.0)  # exp(-200) is 0 in float32
    row[3] = 0.0
    assert kept([row], top_p=top_p)[0][3]
