"""What the door refuses: every value out of range, NaN or of a wrong type, by the field's name."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.sampling_params import (
    MAX_ALLOWED_TOKENS,
    MAX_ARGUMENT_NUMBERS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGITS_PROCESSORS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    BeamSearchParams,
    SamplingParams,
)
from jaxpaged.structured_outputs import StructuredOutputsParams

HUGE = 10**5000  # Python refuses to print it
WRONG_TYPES = ["1", b"1", [1], (), {}, object(), 1j, True]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, 1e308, -1e308, HUGE, -HUGE, None, *WRONG_TYPES]
NOT_COUNTS = [0.5, 1.0, *NOT_NUMBERS]
NOT_SWITCHES = [0, 1, "true", None, [], 1.0]
NOT_IDS = [5, "5", b"5", {5: 5}, [-1], [True], [1.0], ["1"], [None], [2**31], [HUGE], [math.nan]]
NOT_STRINGS = [5, b"x", {"x": 1}, "", ["x", ""], ["x", 5], [None], ["\ud800"], "tail\udfff", object()]
NOT_BIASES = [
    5,
    "x",
    [(1, 1.0)],
    {-1: 1.0},
    {True: 1.0},
    {1.0: 1.0},
    {"x": 1.0},
    {"-1": 1.0},
    {"\u0661": 1.0},  # an Arabic digit
    {2**31: 1.0},
    {HUGE: 1.0},
    {"1" * 5000: 1.0},
    {1: math.nan},
    {1: math.inf},
    {1: -math.inf},
    {1: 100.5},
    {1: -101},
    {1: HUGE},
    {1: "1"},
    {1: None},
    {1: True},
    {1: 1.0, "1": 2.0},
    ((1, 1.0, 1.0),),
    (1, 2),
]

SHARED = {
    "ignore_eos": NOT_SWITCHES,
    "include_stop_str_in_output": NOT_SWITCHES,
    "stop": [*NOT_STRINGS, ["x"] * (MAX_STOP_STRINGS + 1)],
    "stop_token_ids": [*NOT_IDS, list(range(MAX_STOP_TOKENS + 1))],
    "bad_words": [*NOT_STRINGS, ["x"] * (MAX_BAD_WORDS + 1)],
    "logit_bias": [*NOT_BIASES, dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0), dict.fromkeys(range(10**6), 1.0)],
    "allowed_token_ids": [*NOT_IDS, [], range(0), [0] * (MAX_ALLOWED_TOKENS + 1)],
    "logprobs": [-1, 2**31, *(value for value in NOT_COUNTS if value is not None)],
    "structured_outputs": [{"json": {}}, "grammar", 0],
    "logits_processors": [
        5,
        "x",
        [("a", {})],
        {5: {}},
        {"a": 5},
        {"a": [1]},
        {"a": {5: 1}},
        {"a": {"x": "1"}},
        {"a": {"x": None}},
        {"a": {"x": math.nan}},
        {"a": {"x": [1.0, math.inf]}},
        {"a": {"x": HUGE}},
        {"a": {"x": [[[[[1]]]]]}},
        {"a": {"x": [0] * (MAX_ARGUMENT_NUMBERS + 1)}},
        {"a": {"x": np.zeros(MAX_ARGUMENT_NUMBERS + 1)}},
        {"a": {"x": [0] * MAX_ARGUMENT_NUMBERS, "y": 1}},
        {"a" * 10**6: {"x": "1"}},
        (("a", ()), ("a", ())),
        {str(i): {} for i in range(MAX_LOGITS_PROCESSORS + 1)},
    ],
}
SAMPLING = SHARED | {
    "n": [0, -1, 16_385, 10**6, *NOT_COUNTS],
    "temperature": [-1, -1e-9, 100.1, *NOT_NUMBERS],
    "top_p": [0, 0.0, -1, 1.0000001, *NOT_NUMBERS],
    "top_k": [-2, 2**31, *NOT_COUNTS],
    "min_p": [-1, -1e-9, 1.1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, 1e-40, 1e-320, 10_001, *NOT_NUMBERS],
    "seed": [-(2**63) - 1, 2**63, *(value for value in NOT_COUNTS if value is not None)],
    "max_tokens": [0, -1, 2**31, 2**63, *(value for value in NOT_COUNTS if value is not None)],
    "min_tokens": [-1, 17, 2**31, *NOT_COUNTS],
    "prompt_logprobs": [-1, 2**31, *(value for value in NOT_COUNTS if value is not None)],
    "detokenize": NOT_SWITCHES,
    "skip_special_tokens": NOT_SWITCHES,
}
BEAMS = SHARED | {
    "beam_width": [0, -1, 65, *NOT_COUNTS],
    "max_tokens": [0, -1, 2**31, 2**63, *NOT_COUNTS],
    "temperature": [0.1, 1, -1, *NOT_NUMBERS, False],
    "length_penalty": [-101, 100.5, *NOT_NUMBERS],
    "early_stopping": ["never", *NOT_SWITCHES],
}


@pytest.mark.parametrize("name", SAMPLING)
def test_a_bad_value_of_a_sampling_field_is_refused_by_name(name):
    for value in SAMPLING[name]:
        with pytest.raises(ValueError, match=name) as refusal:
            SamplingParams(**{name: value})
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("name", BEAMS)
def test_a_bad_value_of_a_beam_field_is_refused_by_name(name):
    for value in BEAMS[name]:
        with pytest.raises(ValueError, match=name) as refusal:
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 4} | {name: value}))
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(("kind", "table"), [(SamplingParams, SAMPLING), (BeamSearchParams, BEAMS)])
def test_no_field_is_left_unchecked(kind, table):
    assert {field.name for field in dataclasses.fields(kind)} == set(table)


def test_the_message_names_value_and_range():
    with pytest.raises(ValueError, match=r"^temperature=-1 is not allowed: it must be a number from 0 to 100$"):
        SamplingParams(temperature=-1)
    with pytest.raises(ValueError, match=r"^n=\(an integer of 16610 bits\) is not allowed"):
        SamplingParams(n=HUGE)


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="stop strings need detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize(
    "good",
    [
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1e-9},
        {"top_p": 1},
        {"top_k": -1},
        {"min_p": 1},
        {"repetition_penalty": 1e-4},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"n": 16_384},
        {"max_tokens": None, "min_tokens": 2**31 - 1},
        {"min_tokens": 16},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"stop": "x"},
        {"stop": []},
        {"stop": ["x"] * MAX_STOP_STRINGS},
        {"bad_words": ["\x00", "\U0001f600"]},
        {"stop_token_ids": {1, 2}},
        {"stop_token_ids": range(10)},
        {"stop": {"I"}},
        {"n": np.int64(2), "seed": np.uint8(3), "max_tokens": np.int32(20), "top_k": np.int16(4)},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS), -100)},
        {"logit_bias": {"5": 1}},
        {"logit_bias": {}},
        {"allowed_token_ids": (7,)},
        {"logits_processors": {}},
        {"logits_processors": {"a": {}, "b": {"x": 1, "y": [[1.5, 2], [3, 4]], "z": np.arange(3), "w": True}}},
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
    ],
)
def test_the_edges_of_the_ranges_are_allowed(good):
    params = SamplingParams(**good)
    # a checked value checks again, and is the same: replace() is safe
    assert dataclasses.replace(params) == params
    assert hash(params) == hash(dataclasses.replace(params))


def test_integers_of_numpy_become_python_s_and_a_set_of_strings_comes_in_one_order():
    params = SamplingParams(n=np.int64(2), logprobs=np.int32(1), stop_token_ids=np.arange(2).tolist(), stop={"b", "a"})
    assert (type(params.n), type(params.logprobs)) == (int, int)
    assert params.stop == ("a", "b")
    with pytest.raises(ValueError, match="n="):
        SamplingParams(n=np.float64(2))


def test_messages_name_the_limit_and_a_remedy():
    with pytest.raises(ValueError, match="top_k=2147483648 .* from 1 to 2147483647"):
        SamplingParams(top_k=2**31)
    with pytest.raises(ValueError, match="lower the first, or raise the second"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_lists_are_frozen_when_they_are_checked():
    stop_ids, bias = [1, 2], {"3": 4, 5: -6}
    scales = [1.0, 2.0]
    params = SamplingParams(
        stop="end", stop_token_ids=stop_ids, logit_bias=bias, bad_words=["a"], top_k=-1,
        logits_processors={"scale": {"by": scales}},
    )
    scales[0] = math.nan
    stop_ids.append(-1)
    bias[7] = math.nan
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == ((3, 4.0), (5, -6.0))
    assert params.bad_words == ("a",)
    assert params.top_k == 0
    assert params.logits_processors == (("scale", (("by", (1.0, 2.0)),)),)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(SAMPLING)), ANYTHING)
def test_anything_at_all_is_taken_or_refused_with_a_value_error(name, value):
    try:
        params = SamplingParams(**{name: value})
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = f"none: {name} was taken"
        hash(params)
    assert name in refusal


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("guided_decoding", "StructuredOutputsParams"), ("max_new_tokens", "max_tokens"), ("x", "choose")],
)
@pytest.mark.parametrize("kind", [SamplingParams, partial(BeamSearchParams, beam_width=2, max_tokens=2)])
def test_a_name_that_is_no_field_is_refused_with_what_to_use(kind, name, remedy):
    with pytest.raises(ValueError, match=f"{name}=3 is no field of .*Params: .*{remedy}"):
        kind(**{name: 3})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("best_of", "use n"), ("use_beam_search", "use BeamSearchParams"), ("num_beams", r"use BeamSearchParams\(beam_")],
)
def test_what_only_beams_have_is_refused_of_samples_with_what_to_use(name, remedy):
    with pytest.raises(ValueError, match=f"{name}=3 is no field of SamplingParams: {remedy}"):
        SamplingParams(**{name: 3})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("n", "beam_width is also the number of hypotheses"),
        ("num_return_sequences", "beam_width is also the number of hypotheses"),
        ("num_beams", "use beam_width$"),
        ("seed", "draws nothing"),
        ("repetition_penalty", "use logits_processors"),
        ("min_tokens", "length_penalty"),
        ("prompt_logprobs", "SamplingParams"),
    ],
)
def test_what_only_sampling_has_is_refused_of_beams_with_what_to_use(name, remedy):
    with pytest.raises(ValueError, match=f"{name}=3 is no field of BeamSearchParams: .*{remedy}"):
        BeamSearchParams(beam_width=2, max_tokens=2, **{name: 3})
