import pytest
from core.fake_runner import make_request

from jaxpaged.core.admission import SchedulerLimits, check_fits, num_worst_case_blocks
from jaxpaged.core.table_layout import TableLayout

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=32, max_num_logits=8)
LAYOUT = TableLayout(4)


def test_the_worst_case_counts_full_prompt_blocks_once_and_never_the_last_token():
    assert num_worst_case_blocks(make_request("r", range(8), max_tokens=1), LIMITS, LAYOUT) == 2
    assert num_worst_case_blocks(make_request("r", range(8), max_tokens=2), LIMITS, LAYOUT) == 3
    # 9 prompt tokens: 2 blocks together; 9 + 8 - 1 = 16 tokens: 2 more for each of the 3 samples
    assert num_worst_case_blocks(make_request("r", range(9), max_tokens=8, n=3), LIMITS, LAYOUT) == 2 + 3 * 2
    assert num_worst_case_blocks(make_request("r", range(9), max_tokens=1000), LIMITS, LAYOUT) == 8  # 31 tokens


def test_the_worst_case_of_a_window_is_a_window_and_a_step_for_each_sample():
    # steps of 5: a window of 4 and a step touch 8 tokens, 3 columns at most; 9 + 8 - 1 = 16 tokens are 4 columns
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=5, max_model_len=32, max_num_logits=8)
    request = make_request("r", range(9), max_tokens=8, n=3)
    assert num_worst_case_blocks(request, limits, TableLayout(4, (4,))) == 3 * 3
    assert num_worst_case_blocks(request, limits, TableLayout(4, (4, None))) == 3 * 3 + 2 + 3 * 2


@pytest.mark.parametrize(
    ("prompt_len", "options", "words"),
    [
        (0, {}, ["0 prompt tokens"]),
        (32, {}, ["32 tokens", "max_model_len is 32"]),
        (4, {"n": 5}, ["n=5", "max_num_seqs=4"]),
        (20, {"max_tokens": 12}, ["8 blocks", "has 7"]),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers(prompt_len, options, words):
    with pytest.raises(ValueError, match=words[0]) as refusal:
        check_fits(make_request("r", range(prompt_len), **options), LIMITS, 7, LAYOUT)
    assert all(word in str(refusal.value) for word in words)


def test_without_chunks_all_logit_rows_of_a_prompt_must_fit_one_step():
    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, max_num_logits=8, enable_chunked_prefill=False
    )
    check_fits(make_request("r", range(8), prompt_logprobs=0), limits, 9, LAYOUT)
    with pytest.raises(ValueError, match="9 logit rows.*max_num_logits=8"):
        check_fits(make_request("r", range(9), prompt_logprobs=0), limits, 9, LAYOUT)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_num_logits", "max_model_len"])
def test_limits_below_one_are_refused(name):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 32, "max_num_logits": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        SchedulerLimits(**options)


def test_without_chunks_a_step_must_hold_the_longest_sequence():
    with pytest.raises(ValueError, match="max_num_batched_tokens=16 is below max_model_len=32"):
        SchedulerLimits(
            max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32, max_num_logits=8, enable_chunked_prefill=False
        )
