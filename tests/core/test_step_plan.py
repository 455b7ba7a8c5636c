from array import array

import pytest
from core.fake_runner import make_request

from jaxpaged.core.admission import SchedulerLimits
from jaxpaged.core.request import TOKEN_TYPE, Sequence
from jaxpaged.core.step_plan import num_logit_rows, plan_sequence

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 32, "max_num_logits": 8}


def plan(sequence, start, *, num_samples=1, num_tokens=64, num_logits=64, **options):
    item = plan_sequence(sequence, start, num_samples, num_tokens, num_logits, SchedulerLimits(**LIMITS | options))
    return item and (item.num_new_tokens, item.num_samples, num_logit_rows(item))


def prompt_of(num_tokens, **options):
    return Sequence(0, make_request("r", range(num_tokens), **options), 0, array(TOKEN_TYPE, range(num_tokens)))


def test_a_chunk_samples_only_where_it_reaches_the_end():
    sequence = prompt_of(10)
    assert plan(sequence, 0, num_tokens=4) == (4, 0, 0)
    assert plan(sequence, 4, num_tokens=6) == (6, 1, 1)
    assert plan(sequence, 10) is None


def test_a_prompt_stops_one_token_short_when_its_samples_have_no_logit_rows():
    sequence = prompt_of(10, n=3)
    assert plan(sequence, 0, num_samples=3, num_logits=3) == (10, 3, 3)
    assert plan(sequence, 0, num_samples=3, num_logits=2) == (9, 0, 0)
    assert plan(sequence, 9, num_samples=3, num_logits=2) is None


@pytest.mark.parametrize(
    ("start", "num_logits", "expected"),
    [
        (0, 5, (5, 1, 5)),  # four positions whose next token is of the prompt, and the sample
        (0, 4, (4, 0, 4)),
        (0, 3, (3, 0, 3)),
        (3, 2, (2, 1, 2)),
        (3, 1, (1, 0, 1)),
        (4, 1, (1, 1, 1)),
        (4, 0, None),
    ],
)
def test_prompt_logprobs_take_a_logit_row_per_position(start, num_logits, expected):
    assert plan(prompt_of(5, prompt_logprobs=2), start, num_logits=num_logits) == expected


def test_without_chunks_a_prompt_goes_whole_or_not_at_all():
    sequence = prompt_of(10)
    assert plan(sequence, 0, num_tokens=9, enable_chunked_prefill=False) is None
    assert plan(sequence, 0, num_tokens=10, enable_chunked_prefill=False) == (10, 1, 1)


def test_nothing_is_planned_past_the_last_token_a_sequence_may_have():
    sequence = prompt_of(4, max_tokens=2)
    sequence.token_ids.append(9)
    assert plan(sequence, 4) == (1, 1, 1)
    sequence.num_pending_tokens = 1
    assert plan(sequence, 5) is None  # the second output is on its way
    long = prompt_of(30, max_tokens=9)
    assert plan(long, 0, max_model_len=32) == (30, 1, 1)
    long.num_pending_tokens = 1
    assert plan(long, 30) == (1, 1, 1)
    long.num_pending_tokens = 2
    assert plan(long, 31) is None
