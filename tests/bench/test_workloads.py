"""The workload of the benches: seeded, of the stated means, and cut into batches without loss."""

import pytest

from bench.workloads import MAX_LEN, MIN_LEN, sharegpt_like, static_batches


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    assert sharegpt_like(vocab_size=512, seed=3) == sharegpt_like(vocab_size=512, seed=3)
    assert sharegpt_like(vocab_size=512, seed=3) != sharegpt_like(vocab_size=512, seed=4)


def test_lengths_have_the_asked_means_and_lie_within_the_clip():
    requests = sharegpt_like(vocab_size=512)
    prompt_lens = [len(request.prompt_token_ids) for request in requests]
    output_lens = [request.max_tokens for request in requests]
    for lens, mean in ((prompt_lens, 160), (output_lens, 180)):
        assert sum(lens) / 64 == pytest.approx(mean, abs=0.5)  # each length is rounded
        assert min(lens) >= MIN_LEN
        assert max(lens) <= MAX_LEN
        assert sorted(lens)[32] < mean  # long-tailed
    assert all(3 <= token < 512 for request in requests for token in request.prompt_token_ids)


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("batch_size", [8, 24, 64])
def test_static_batches_hold_every_request_once(batch_size: int, is_sorted: bool):
    requests = sharegpt_like(vocab_size=512)
    batches = static_batches(requests, batch_size, is_sorted=is_sorted)
    assert sorted(index for batch in batches for index in batch) == list(range(64))
    assert all(len(batch) <= batch_size for batch in batches)


def test_sorting_by_output_length_never_makes_static_batches_longer():
    requests = sharegpt_like(vocab_size=512)

    def num_steps(is_sorted: bool) -> int:
        batches = static_batches(requests, 16, is_sorted=is_sorted)
        return sum(max(requests[index].max_tokens for index in batch) for batch in batches)

    assert num_steps(is_sorted=True) < num_steps(is_sorted=False)


def test_a_mean_that_the_clip_cannot_give_is_refused():
    with pytest.raises(ValueError, match="mean=400"):
        sharegpt_like(vocab_size=512, prompt_mean=400)
