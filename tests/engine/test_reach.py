"""What is warmed for some requests is what they meet: nothing compiles behind it, and little is left unused."""

import itertools

import pytest
from harness import finish, make_engine, random_prompts, tiny_model

from jaxpaged.runner.buckets import Bucket
from jaxpaged.sampling_params import SamplingParams

NUM_BLOCKS = itertools.count(300)  # a cache of its own size compiles every step anew


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5)


def greedy(**options):
    return SamplingParams(**{"temperature": 0, "max_tokens": 4} | options)


def add(engine, prompts, params):
    many = params if isinstance(params, list) else [params] * len(prompts)
    return [engine.add_request(prompt, one) for prompt, one in zip(prompts, many, strict=True)]


def warm_up(engine, request_ids):
    """As `LLM` does."""
    engine.warm_up(engine.buckets_for(request_ids), with_sampler=engine.needs_sampler(request_ids))
    engine.warm_up_rows_and_copies(request_ids)
    if engine.can_run_out_of_blocks(request_ids):
        engine.warm_up_preemption()


def buckets_met(engine, monkeypatch):
    """The buckets of the steps from here on."""
    met, build = set(), engine.runner.build

    def spied(plan):
        batch = build(plan)
        if batch is not None:
            met.add(batch.layout.bucket)
        return batch

    monkeypatch.setattr(engine.runner, "build", spied)
    return met


CASES = {
    "prompt logprobs in chunks": ((36,), greedy(prompt_logprobs=2)),
    "logprobs": ((5,), greedy(logprobs=2)),
    "samples that copy on write": ((5,), SamplingParams(n=6, seed=1, max_tokens=4)),
    "penalties": ((5,), greedy(repetition_penalty=1.2)),
    "ends at different times": ((5, 9, 12), [greedy(max_tokens=n) for n in (1, 5, 2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_compiles_behind_the_warm_up_of_a_call_and_every_step_of_a_prompt_was_foreseen(
    model, name, monkeypatch
):
    lengths, params = CASES[name]
    engine = make_engine(model, num_device_blocks=next(NUM_BLOCKS))
    ids = add(engine, random_prompts(1, lengths), params)
    reachable = set(engine.buckets_for(ids))
    warm_up(engine, ids)
    met = buckets_met(engine, monkeypatch)
    outputs = finish(engine)
    assert {one.finish_reason for output in outputs.values() for one in output.outputs} == {"length"}
    assert engine.stats().num_compiles_after_warmup == 0
    assert met <= reachable
    # decodes of samples that might have ended one by one are all that may be left
    assert all(bucket.num_tokens <= 8 for bucket in reachable - met)
    if "copy on write" in name:
        assert engine.stats().num_copied_blocks == 5


def test_a_short_prompt_with_prompt_logprobs_reaches_its_own_step_and_the_decode(model):
    engine = make_engine(model, max_num_batched_tokens=64, max_num_seqs=16)
    ids = add(engine, [[1, 2, 3]], greedy(prompt_logprobs=0))
    assert engine.buckets_for(ids) == (Bucket(1, 1, 1), Bucket(4, 4, 4))
    ids = add(engine, [[1, 2, 3]], greedy(prompt_logprobs=0, max_tokens=1))
    assert engine.buckets_for(ids) == (Bucket(4, 4, 4),)


def test_prompts_that_mix_with_decodes_reach_everything_up_to_their_sum(model, monkeypatch):
    for lengths, options in (
        ((30, 40, 17), {}),  # more than a step takes
        ((9, 9, 5), {"max_num_seqs": 2}),  # more than rows
        ((25, 25, 25, 9), {"num_device_blocks": 9, "preemption": "recompute"}),  # recomputed with their outputs
    ):
        engine = make_engine(model, **options)
        ids = add(engine, random_prompts(2, lengths), greedy(max_tokens=20))
        reachable = set(engine.buckets_for(ids))
        met = buckets_met(engine, monkeypatch)
        finish(engine)
        assert len(met) > 2
        assert met <= reachable


def test_a_prefix_that_others_compute_or_that_is_cached_already_is_counted_with(model, monkeypatch):
    prefix = random_prompts(3, (16,))[0]
    prompts = [prefix + tail for tail in random_prompts(4, (5, 3))]
    engine = make_engine(model)
    for _ in range(2):  # in the second turn both find the prefix
        ids = add(engine, prompts, greedy())
        reachable = set(engine.buckets_for(ids))
        met = buckets_met(engine, monkeypatch)
        finish(engine)
        assert met <= reachable
    (alone,) = add(engine, [prompts[0]], greedy())
    assert engine.buckets_for([alone]) == (Bucket(1, 1, 1), Bucket(8, 8, 8))  # 5 tokens of 21
