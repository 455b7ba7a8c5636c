"""Log-probabilities: raw or processed, of the prompt too, equal to a full forward whatever the cache and the pool."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from harness import TINY, Run, make_engine, random_prompts, run, tiny_model
from logit_rows import LogitRow, load_state, make_batch
from tiny_checkpoints import empty_kv, run_dense

from jaxpaged.runner.sampler import sample
from jaxpaged.sampling_params import SamplingParams

LENGTHS = (5, 17, 8, 30, 1, 16, 9, 40)
TIGHT = 17
BOTH = SamplingParams(temperature=0, max_tokens=20, logprobs=3, prompt_logprobs=3)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, seed=5, n=2, max_tokens=12, logprobs=3, prompt_logprobs=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS)


def log_softmax(logits):
    exact = logits.astype(np.float64)
    exact = exact - exact.max(-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def assert_entry(entry, exact):
    """An entry against the exact log-probabilities of its position [vocab]."""
    assert abs(entry.logprob - exact[entry.token_id]) < 1e-4
    for token_id, logprob in entry.top:
        assert abs(logprob - exact[token_id]) < 1e-4
    likeliest = np.sort(exact)[::-1][: len(entry.top)]
    np.testing.assert_allclose([logprob for _, logprob in entry.top], likeliest, atol=1e-4)


def assert_as_one_forward(model, got: Run) -> None:
    """Every entry, of prompts and outputs, against one dense forward of prompt and output together."""
    module, config = model
    for output in got.outputs:
        num_prompt = len(output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None  # nothing comes before the first token
        for completion in output.outputs:
            tokens = np.array([*output.prompt_token_ids, *completion.token_ids], np.int32)
            padded = np.zeros(TINY.max_position_embeddings, np.int32)
            padded[: len(tokens)] = tokens
            exact = log_softmax(run_dense(module, padded, 0, empty_kv(config, len(padded)))[0])
            for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
                assert entry.token_id == tokens[position]
                assert_entry(entry, exact[position - 1])
            assert len(completion.logprobs) == len(completion.token_ids)
            for index, entry in enumerate(completion.logprobs):
                assert entry.token_id == completion.token_ids[index]
                assert_entry(entry, exact[num_prompt + index - 1])


@pytest.mark.parametrize("preemption", ["none", "swap", "recompute"])
@pytest.mark.parametrize("params", [BOTH, SAMPLED], ids=["greedy", "n2"])
def test_every_logprob_is_that_of_one_full_forward(model, prompts, params, preemption):
    options = {} if preemption == "none" else {"num_device_blocks": TIGHT, "preemption": preemption}
    got = run(make_engine(model, **options), prompts, params)
    assert (got.stats.num_preemptions > 0) is (preemption != "none")
    assert_as_one_forward(model, got)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_no_bit_depends_on_company_pool_or_cache_in_batch_invariant_mode(model, prompts, mode, preemption):
    options = {"batch_invariant": True, "logprobs_mode": mode}
    alone = [run(make_engine(model, **options), [prompt], SAMPLED).outputs[0] for prompt in prompts]
    engine = make_engine(model, **options, num_device_blocks=TIGHT, preemption=preemption)
    for _ in range(2):  # the second time, all prompts are in the prefix cache, as far as it holds them
        together = run(engine, prompts, SAMPLED)
        assert together.stats.num_preemptions > 0
        for one, other in zip(alone, together.outputs, strict=True):
            assert one.prompt_logprobs == other.prompt_logprobs
            assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
            assert [c.logprobs for c in one.outputs] == [c.logprobs for c in other.outputs]


def test_a_prompt_in_the_prefix_cache_gets_its_logprobs_all_the_same(model):
    (prompt,) = random_prompts(1, (40,))
    engine = make_engine(model, batch_invariant=True)
    plain = SamplingParams(temperature=0, max_tokens=4)
    run(engine, [prompt], plain)
    assert run(engine, [prompt], plain).outputs[0].num_cached_tokens == 32
    # it is computed again, because the logits of a cached position are nowhere; its blocks are found by others again
    got = run(engine, [prompt], BOTH).outputs[0]
    assert got.num_cached_tokens == 0
    fresh = run(make_engine(model, batch_invariant=True), [prompt], BOTH).outputs[0]
    assert got.prompt_logprobs == fresh.prompt_logprobs
    assert run(engine, [prompt], plain).outputs[0].num_cached_tokens == 32


# ---- what the modes report


PROCESSED = SamplingParams(
    temperature=0.7, top_k=6, top_p=0.9, logit_bias={3: 2.0}, repetition_penalty=1.3, logprobs=3, seed=1
)


def reported(params, mode, num_rows=8):
    logits = np.random.default_rng(0).normal(size=37).astype(np.float32)
    rows = [LogitRow(logits, params, prompt=[1, 2], output=[3], seed=seed) for seed in range(num_rows)]
    logits_of, batch = make_batch(rows, num_rows, num_rows)
    output, _ = jax.jit(sample, static_argnums=(3, 4))(logits_of, load_state(rows, num_rows), batch, 3, mode)
    return logits, SimpleNamespace(**{name: np.asarray(array) for name, array in vars(output).items()})


def processed_by_hand(logits):
    exact = logits.astype(np.float64)
    exact[3] += 2.0
    for token in (1, 2, 3):
        exact[token] = exact[token] / 1.3 if exact[token] > 0 else exact[token] * 1.3
    exact = exact / 0.7
    order = np.argsort(-exact)
    exact[order[6:]] = -np.inf
    weights = np.exp(exact - exact.max())
    share = np.sort(weights / weights.sum())[::-1]
    kept = int(np.argmax(np.cumsum(share) >= 0.9)) + 1
    exact[order[kept:]] = -np.inf
    return exact


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_a_mode_reports_what_its_name_says(mode):
    logits, output = reported(PROCESSED, mode)
    exact = logits.astype(np.float64) if mode.startswith("raw") else processed_by_hand(logits)
    if mode.endswith("logprobs"):
        exact = log_softmax(exact)
    np.testing.assert_allclose(output.logprob, exact[output.tokens], atol=1e-5)
    assert np.isfinite(output.logprob).all()
    assert len(set(output.tokens.tolist())) > 1
    best = np.sort(exact)[::-1][:3]
    np.testing.assert_allclose(output.top_logprobs, np.broadcast_to(best, (8, 3)), atol=1e-5)


def test_processed_logprobs_of_a_greedy_row_have_no_temperature_and_nothing_cut():
    params = SamplingParams(temperature=0, top_k=2, min_p=0.9, logit_bias={3: 2.0}, logprobs=3)
    logits, output = reported(params, "processed_logprobs")
    exact = logits.astype(np.float64)
    exact[3] += 2.0
    np.testing.assert_allclose(output.top_logprobs[0], np.sort(log_softmax(exact))[::-1][:3], atol=1e-5)


def test_prompt_logprobs_are_of_the_models_logits_in_processed_mode_too(model):
    (prompt,) = random_prompts(2, (12,))
    params = SamplingParams(temperature=0.5, logit_bias={5: 9.0}, prompt_logprobs=2, max_tokens=2, seed=0)
    outputs = [
        run(make_engine(model, batch_invariant=True, logprobs_mode=mode), [prompt], params).outputs[0]
        for mode in ("raw_logprobs", "processed_logprobs")
    ]
    assert outputs[0].prompt_logprobs == outputs[1].prompt_logprobs


def test_an_unknown_mode_is_refused_by_name(model):
    with pytest.raises(ValueError, match="logprobs_mode='raw'.*raw_logprobs, processed_logprobs"):
        make_engine(model, logprobs_mode="raw")
