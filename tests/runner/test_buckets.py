"""Buckets: the smallest that holds a step, and no shape beyond the list."""

import pytest

from jaxpaged.runner.buckets import Bucket, make_buckets

BUCKETS = make_buckets(max_num_batched_tokens=512, max_num_seqs=64)
WIDE = make_buckets(max_num_batched_tokens=2048, max_num_seqs=256)


def test_sizes_are_powers_of_two_and_small_ones_have_a_logit_row_per_token():
    assert [bucket.num_tokens for bucket in BUCKETS.all] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [bucket.num_logits for bucket in BUCKETS.all] == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]
    assert WIDE.max_num_logits == 256
    assert Bucket(1024, 64, 256) in WIDE.all
    assert Bucket(1024, 256, 256) in WIDE.all


@pytest.mark.parametrize(
    ("step", "bucket"),
    [
        ((1, 1, 1), Bucket(1, 1, 1)),
        ((3, 3, 3), Bucket(4, 4, 4)),
        ((40, 1, 1), Bucket(64, 64, 64)),
        ((65, 2, 2), Bucket(128, 64, 64)),
        ((4, 60, 1), Bucket(64, 64, 64)),  # many samples of one short prompt
    ],
)
def test_a_step_takes_the_smallest_bucket_that_holds_it(step, bucket):
    assert BUCKETS.pick(*step) == bucket


def test_a_step_that_no_bucket_holds_is_an_error():
    with pytest.raises(ValueError, match="513 tokens"):
        BUCKETS.pick(513, 1, 1)


def test_steps_and_decodes_of_samples_that_end_one_by_one_have_their_buckets():
    # 1100 = 512 + 512 + 76
    assert BUCKETS.of_steps([(512, 0, 1), (76, 1, 1)], 3) == (
        Bucket(1, 1, 1), Bucket(2, 2, 2), Bucket(4, 4, 4), Bucket(128, 64, 64), Bucket(512, 64, 64),
    )  # fmt: skip
    assert BUCKETS.of_steps([(40, 1, 1)], 0) == (Bucket(64, 64, 64),)


@pytest.mark.parametrize("most", [(70, 2), (6, 10), (900, 70), (100_000, 100_000)])
def test_the_buckets_up_to_a_size_are_those_of_every_step_up_to_it(most):
    reached = WIDE.up_to(*most)
    steps = [
        (tokens, logits)
        for tokens in range(1, min(most[0], 2048) + 1)
        for logits in range(min(most[1], 256) + 1)
        if logits <= tokens or most == (6, 10)  # samples of a short prompt
    ]
    assert {WIDE.pick(*step, 1) for step in steps} <= set(reached)
    assert len(reached) <= len({WIDE.pick(*step, 1) for step in steps}) + 1


def test_the_invariant_list_is_one_bucket():
    (bucket,) = make_buckets(max_num_batched_tokens=100, max_num_seqs=8, is_single=True).all
    assert bucket == Bucket(100, 64, 8)


def test_sixteen_bit_weights_on_cpu_never_meet_a_single_row():
    assert make_buckets(max_num_batched_tokens=8, max_num_seqs=8, min_num_tokens=2).all[0] == Bucket(2, 2, 2)


def test_where_tokens_take_time_there_are_sizes_half_way_between():
    fine = make_buckets(max_num_batched_tokens=200, max_num_seqs=64, has_middles=True)
    assert [bucket.num_tokens for bucket in fine.all] == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200]
    assert fine.pick(40, 40, 40) == Bucket(48, 48, 48)
