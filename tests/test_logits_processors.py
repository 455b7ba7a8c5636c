"""Logits processors in the engine: pressure, company, one that misbehaves, and what a request may ask."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness import drain, make_engine, random_prompts, run, tiny_model
from processors import PROCESSORS

from jaxpaged.engine.engine import Engine
from jaxpaged.sampling_params import SamplingParams

LENGTHS = (5, 17, 8, 30, 1, 16, 9, 40)
TIGHT = 17
PLAIN = SamplingParams(temperature=0, max_tokens=16, logprobs=1)
NO_REPEATS = SamplingParams(
    temperature=0, max_tokens=16, logprobs=1, logits_processors={"forbid_repeats": {"window": 100}}
)
SAMPLED = SamplingParams(
    temperature=0.9, seed=4, n=2, max_tokens=16, logprobs=1,
    logits_processors={"favour": {"ids": [5, 9, 77, -1], "bonus": 3.5}, "forbid_repeats": {}},
)
MIXED = [PLAIN, NO_REPEATS, SAMPLED, NO_REPEATS, SAMPLED, PLAIN, NO_REPEATS, SAMPLED]


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS)


def engine_of(model, **options) -> Engine:
    return make_engine(model, logits_processors=PROCESSORS, batch_invariant=True, **options)


@pytest.fixture(scope="module")
def ample(model, prompts):
    return run(engine_of(model), prompts, MIXED)


def test_a_processor_decides_what_is_drawn(ample, prompts):
    for index in (1, 3, 6):
        (completion,) = ample.outputs[index].outputs
        seen = [*prompts[index], *completion.token_ids]
        assert len(set(seen[len(prompts[index]) :])) == 16
        assert not set(completion.token_ids) & set(prompts[index])
    # raw log-probabilities are the model's own
    entry = ample.outputs[1].outputs[0].logprobs[-1]
    assert entry.top[0][1] >= entry.logprob


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_pressure_changes_no_bit(model, prompts, ample, preemption):
    tight = run(engine_of(model, num_device_blocks=TIGHT, preemption=preemption), prompts, MIXED)
    assert tight.stats.num_preemptions > 0
    assert tight.token_ids == ample.token_ids
    assert tight.logprobs == ample.logprobs


def test_company_changes_no_bit_and_others_are_as_without_processors(model, prompts, ample):
    for index in (0, 1, 2):
        alone = run(engine_of(model), [prompts[index]], MIXED[index])
        assert alone.token_ids[0] == ample.token_ids[index]
        assert alone.logprobs[0] == ample.logprobs[index]
    without = run(make_engine(model, batch_invariant=True), [prompts[0], prompts[5]], PLAIN)
    assert without.token_ids == [ample.token_ids[0], ample.token_ids[5]]
    assert without.logprobs == [ample.logprobs[0], ample.logprobs[5]]


def test_a_processor_that_gives_nan_ends_its_request_alone(model, prompts, ample):
    bad = SamplingParams(temperature=0, max_tokens=16, logits_processors={"late_nan": {}, "favour": {}})
    engine = engine_of(model)
    got = run(engine, [*prompts, prompts[0]], [*MIXED[:4], bad, *MIXED[5:], bad])
    for index in (4, 8):
        completion = got.outputs[index].outputs[0]
        assert completion.finish_reason == "error"
        assert "logits_processors['late_nan'] gave logits that are NaN" in completion.stop_reason
        assert len(completion.token_ids) == 3
    for index in (0, 1, 2, 3, 5, 6, 7):
        assert got.token_ids[index] == ample.token_ids[index]
        assert got.logprobs[index] == ample.logprobs[index]
    drain(engine)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"other": {}}, "logits_processors names 'other'"),
        ({"favour": {"bonus": [1.0]}}, r"logits_processors\['favour'\]\['bonus'\] has the shape"),
    ],
)
def test_what_the_engine_does_not_have_is_refused_before_anything_is_queued(model, asked, message):
    engine = engine_of(model)
    with pytest.raises(ValueError, match=message):
        engine.add_request([1, 2], SamplingParams(logits_processors=asked))
    assert not engine.has_unfinished
    with pytest.raises(ValueError, match="does not have: load with logits_processors="):
        make_engine(model).add_request([1, 2], SamplingParams(logits_processors={"favour": {}}))


def test_a_bad_function_is_refused_when_the_engine_is_made(model):
    with pytest.raises(ValueError, match=r"logits_processors\['half'\] returns float16"):
        make_engine(model, logits_processors={"half": lambda logits, context: logits.astype(jnp.float16)})


def test_the_memory_plan_counts_the_arguments(model):
    def wide(logits, context, *, table=np.zeros(1000, np.float32)):  # noqa: B008
        return logits + table[0]

    plain, counted = (make_engine(model, logits_processors=one).memory_plan for one in ({}, {"wide": wide}))
    assert counted.sampler_bytes - plain.sampler_bytes == (8 + 1) * 4000


def test_bans_hold_whatever_a_processor_says(model, prompts):
    params = SamplingParams(
        temperature=0, max_tokens=6, allowed_token_ids=[1, 2, 3],
        logits_processors={"favour": {"ids": [50, 51, 52, 53], "bonus": 1e6}},
    )
    got = run(engine_of(model), prompts[:2], params)
    assert {token for output in got.token_ids for tokens in output for token in tokens} <= {1, 2, 3}


def test_nothing_compiles_after_warm_up(model, prompts):
    engine = engine_of(model, num_device_blocks=TIGHT)
    engine.warm_up(engine.runner.shapes.buckets.all, with_extended=engine.needs_extended_sampler(None))
    engine.warm_up_preemption()
    got = run(engine, prompts, MIXED)
    assert got.stats.num_preemptions > 0
    assert got.stats.num_compiles_after_warmup == 0
