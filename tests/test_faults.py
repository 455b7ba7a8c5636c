"""Bad input and faults: one clear error each, neighbours untouched, every block back."""

import math

import jax.numpy as jnp
import pytest
from harness import drain, finish, make_engine, random_prompts, run, tiny_model

from jaxpaged.engine.engine import EngineDeadError
from jaxpaged.runner.swap import SwapError
from jaxpaged.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
POISONED_TOKEN = 77
"""Its embedding is NaN in the models below that need one bad sequence."""


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


def refused(engine, match: str, prompt, params=GREEDY) -> None:
    with pytest.raises(ValueError, match=match):
        engine.add_request(prompt, params)
    assert not engine.has_unfinished
    drain(engine)


def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(model):
    engine = make_engine(model)
    refused(engine, r"128 tokens.*max_model_len is 128", [1] * 128)
    assert run(engine, [[1] * 127], GREEDY).outputs[0].outputs[0].finish_reason == "length"


def test_a_request_larger_than_the_pool_is_refused_with_both_numbers(model):
    engine = make_engine(model, num_device_blocks=6)
    refused(engine, r"\b5\b", [1] * 100)  # 5 usable blocks


@pytest.mark.parametrize("prompt", [[], [-1], [199], [True], [1.5], [None], ["a"]])
def test_ids_that_are_no_tokens_are_refused(model, prompt):
    refused(make_engine(model), "prompt", prompt)


def test_a_request_for_more_samples_than_may_run_is_refused(model):
    refused(make_engine(model), "max_num_seqs", [1, 2], SamplingParams(n=9))


def test_an_endless_max_tokens_is_cut_to_what_the_model_holds(model):
    engine = make_engine(model)
    output = run(engine, [[1] * 100], SamplingParams(temperature=0, max_tokens=2**31 - 1)).outputs[0]
    assert len(output.outputs[0].token_ids) == 28


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(logit_bias={199: 1.0}), "logit_bias"),
        (SamplingParams(allowed_token_ids=[199]), "allowed_token_ids"),
        (SamplingParams(stop_token_ids=[500]), "stop_token_ids"),
        (SamplingParams(logprobs=21), "max_logprobs"),
        (SamplingParams(prompt_logprobs=21), "max_logprobs"),
        (SamplingParams(stop=["x"]), "tokenizer"),
        (SamplingParams(bad_words=["x"]), "tokenizer"),
    ],
)
def test_parameters_that_do_not_fit_the_model_are_refused_by_name(model, params, name):
    refused(make_engine(model), name, [1, 2], params)


def test_a_duplicate_id_is_refused_and_an_unknown_one_is_not_aborted(model):
    engine = make_engine(model)
    engine.add_request([1, 2], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="'a'"):
        engine.add_request([1, 2], GREEDY, request_id="a")
    assert not engine.abort("b")
    assert engine.abort("a")
    assert not engine.abort("a")
    assert finish(engine)["a"].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("run_ahead", [True, False])
def test_an_abort_gives_every_block_back_at_any_time(model, num_steps, run_ahead):
    engine = make_engine(model, run_ahead=run_ahead, num_device_blocks=17)
    prompts = random_prompts(0, (40, 30, 20, 60))
    ids = [engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=20, n=2)) for prompt in prompts]
    for _ in range(num_steps):
        assert not [output for output in engine.step() if output.finished]
    for request_id in ids:
        assert engine.abort(request_id)
    finished = finish(engine)
    assert {output.outputs[0].finish_reason for output in finished.values()} == {"abort"}


@pytest.mark.parametrize("run_ahead", [True, False])
def test_a_sequence_whose_logits_are_nan_ends_alone(run_ahead):
    module, config = tiny_model(seed=3)
    module.embedding.table[...] = module.embedding.table[...].at[POISONED_TOKEN].set(jnp.nan)
    model = (module, config)
    prompts = [[token for token in prompt if token != POISONED_TOKEN] for prompt in random_prompts(2, (20, 30, 9))]
    alone = run(make_engine(model, run_ahead=run_ahead), prompts, GREEDY)
    engine = make_engine(model, run_ahead=run_ahead)
    bad = prompts[0][:16] + [POISONED_TOKEN] * 3
    mixed = run(engine, [prompts[0], bad, prompts[1], bad, prompts[2]], GREEDY)
    assert [output.outputs[0].finish_reason for output in mixed.outputs] == [
        "length", "error", "length", "error", "length",
    ]
    assert "NaN" in mixed.outputs[1].outputs[0].stop_reason
    assert [mixed.token_ids[i] for i in (0, 2, 4)] == alone.token_ids
    # nothing it computed is found again by a later request
    again = run(engine, [bad[:17] + [5, 6], prompts[1]], GREEDY)
    assert again.outputs[0].outputs[0].finish_reason == "error"
    assert again.token_ids[1] == alone.token_ids[1]
    assert engine.finished_counts.by_reason["error"] == 3


@pytest.mark.parametrize("which", ["swap_out", "swap_in"])
def test_a_swap_that_fails_loses_no_request(model, which, monkeypatch):
    prompts = random_prompts(5, (5, 17, 8, 30, 1, 16, 9, 40))
    params = SamplingParams(temperature=0, max_tokens=24)
    ample = run(make_engine(model, batch_invariant=True), prompts, params)
    engine = make_engine(model, batch_invariant=True, num_device_blocks=17)
    mover = engine.runner._mover
    real = getattr(mover, which)
    calls = []

    def failing(kv, copies):
        calls.append(len(copies))
        if len(calls) % 2:
            raise SwapError("injected")
        return real(kv, copies)

    monkeypatch.setattr(mover, which, failing)
    tight = run(engine, prompts, params)
    assert calls
    assert tight.stats.num_failed_swaps > 0
    assert tight.token_ids == ample.token_ids


def test_a_full_host_pool_means_recompute(model):
    prompts = random_prompts(5, (5, 17, 8, 30, 1, 16, 9, 40))
    params = SamplingParams(temperature=0, max_tokens=24)
    ample_engine = make_engine(model, batch_invariant=True)
    ample = run(ample_engine, prompts, params)
    one_block = ample_engine.memory_plan.block_bytes
    tight_engine = make_engine(model, batch_invariant=True, num_device_blocks=17, host_memory_bytes=one_block)
    tight = run(tight_engine, prompts, params)
    assert tight.stats.num_recompute_preemptions > 0
    assert tight.token_ids == ample.token_ids


def test_many_long_requests_finish_in_a_small_pool(model):
    prompts = random_prompts(9, [60] * 64)
    params = SamplingParams(temperature=0, max_tokens=40)
    ample = run(make_engine(model, batch_invariant=True), prompts, params)
    tight = run(make_engine(model, batch_invariant=True, num_device_blocks=41), prompts, params)
    assert tight.stats.num_preemptions > 0
    assert tight.token_ids == ample.token_ids


@pytest.mark.parametrize("where", ["begin", "finish", "read"])
@pytest.mark.parametrize("run_ahead", [True, False])
def test_a_step_that_fails_ends_what_it_held_and_the_engine_goes_on(model, where, run_ahead, monkeypatch):
    engine = make_engine(model, run_ahead=run_ahead, max_num_seqs=2)
    ids = [engine.add_request(prompt, GREEDY) for prompt in random_prompts(1, (9, 9, 9, 9))]
    for _ in range(3):
        engine.step()

    def broken(*arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: injected")

    with monkeypatch.context() as patch:
        patch.setattr(*{
            "begin": (engine.runner, "begin", broken),
            "finish": (engine.runner, "finish", broken),
            "read": ("jaxpaged.runner.model_runner.InFlight.read", broken),
        }[where])
        ended = {output.request_id: output for output in engine.step()}
    ended |= finish(engine)
    reasons = [ended[request_id].outputs[0].finish_reason for request_id in ids]
    assert reasons == ["error", "error", "length", "length"]
    assert "RESOURCE_EXHAUSTED" in ended[ids[0]].outputs[0].stop_reason
    # what runs afterwards is right
    fresh = run(make_engine(model), random_prompts(1, (9, 9, 9, 9)), GREEDY)
    assert run(engine, random_prompts(1, (9, 9, 9, 9)), GREEDY).token_ids == fresh.token_ids


def test_an_engine_that_cannot_recover_says_it_is_dead(model, monkeypatch):
    engine = make_engine(model, run_ahead=False)
    engine.add_request([1, 2, 3], GREEDY)

    def broken(*arguments, **options):
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.runner, "begin", broken)
    monkeypatch.setattr(engine.runner, "reset", broken)
    with pytest.raises(EngineDeadError, match="injected"):
        engine.step()


def test_an_exception_in_one_detokenizer_ends_that_request_only(model, monkeypatch):
    class Broken:
        stop_reason = None
        text = ""

        def __init__(self, is_broken):
            self.is_broken = is_broken

        def append(self, token_id):
            if self.is_broken:
                raise RuntimeError("injected")

        def finish(self):
            pass

    engine = make_engine(model, tokenizer=object(), scheduling_policy="priority")
    monkeypatch.setattr(engine, "_make_detokenizer", lambda live: Broken(live.request.priority == 1))
    ids = [engine.add_request([1, 2, 3], GREEDY, priority=priority) for priority in (0, 1, 0)]
    finished = finish(engine)
    assert [finished[i].outputs[0].finish_reason for i in ids] == ["length", "error", "length"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 0, 1.5, True])
def test_a_memory_fraction_out_of_range_is_refused(model, value):
    with pytest.raises(ValueError, match="device_memory_fraction"):
        make_engine(model, device_memory_fraction=value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 12}, "power of two"),
        ({"dtype": "int8"}, "float32"),
        ({"preemption": "drop"}, "recompute"),
        ({"max_num_seqs": 64}, "max_num_batched_tokens"),
        ({"max_model_len": 4096}, "128"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens"),
        ({"tensor_parallel_size": 3}, "does not divide the model's 4 query heads"),
        ({"num_device_blocks": 1}, "num_device_blocks"),
    ],
)
def test_choices_that_contradict_are_refused(model, options, match):
    with pytest.raises(ValueError, match=match):
        make_engine(model, **options)
