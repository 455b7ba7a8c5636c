"""Beam search through the engine: what transformers finds, whatever the pool, the company, the block size."""

import math

import numpy as np
import pytest
from beam_goldens import CASES, MAX_TOKENS, MODELS, PROMPTS, STOP_TOKENS, compute, read, write_model
from harness import Run, drain, make_engine, random_prompts, run, tiny_model

from converters import load_huggingface
from jaxpaged import LLM
from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams


def beams(width: int = 4, **options) -> BeamSearchParams:
    return BeamSearchParams(**{"beam_width": width, "max_tokens": 20, "stop_token_ids": [7, 90], **options})


def hypotheses(output: RequestOutput) -> list[tuple[tuple[int, ...], float]]:
    return [(completion.token_ids, completion.score) for completion in output.outputs]


def assert_near(one: Run, other: Run) -> None:
    """Equal token for token, scores within 1e-4."""
    assert one.token_ids == other.token_ids
    for a, b in zip(one.outputs, other.outputs, strict=True):
        for left, right in zip(a.outputs, b.outputs, strict=True):
            assert left.score == pytest.approx(right.score, abs=1e-4)


# -- transformers


@pytest.fixture(scope="module")
def goldens():
    return read()


@pytest.mark.parametrize("name", MODELS)
def test_hypotheses_and_scores_are_those_of_transformers(goldens, tmp_path, name: str) -> None:
    """56 searches at once, of widths 2 to 8, in a pool so small that they take turns."""
    config, model = load_huggingface(write_model(tmp_path, name), dtype="float32")
    engine = make_engine((model, config), max_num_seqs=24, max_num_batched_tokens=64, num_device_blocks=34)
    params = [
        BeamSearchParams(
            beam_width=case.width, max_tokens=MAX_TOKENS, length_penalty=case.length_penalty,
            early_stopping=case.early_stopping, stop_token_ids=STOP_TOKENS[name], ignore_eos=True,
        )
        for case in CASES
    ]  # fmt: skip
    made = run(engine, [PROMPTS[name]] * len(CASES), params)
    num_ended = 0
    for case, output in zip(CASES, made.outputs, strict=True):
        expected = goldens[name][str(case)]
        assert [list(tokens) for tokens, _ in hypotheses(output)] == [tokens for tokens, _ in expected], str(case)
        # float32 sums in another order
        np.testing.assert_allclose([s for _, s in hypotheses(output)], [s for _, s in expected], atol=1e-4)
        for completion in output.outputs:
            is_stop = completion.token_ids[-1] in STOP_TOKENS[name]
            assert completion.finish_reason == ("stop" if is_stop else "length")
            assert completion.score == pytest.approx(
                completion.cumulative_logprob / len(completion.token_ids) ** case.length_penalty
            )
            num_ended += is_stop
    assert num_ended > 10, "searches end by stop tokens, too"
    assert made.stats.num_preemptions > 0
    assert made.stats.num_copied_blocks > 0


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_finds_what_is_recorded(goldens, name: str) -> None:
    pytest.importorskip("torch", reason="the parity extra is not installed")
    for case, found in compute(name):
        recorded = goldens[name][case]
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in recorded]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in recorded], atol=1e-5)


def test_the_published_searches_of_a_trained_model_come_out(stories260k, golden_beams) -> None:
    llm = LLM(stories260k, dtype="float32", num_device_blocks=64, max_num_seqs=8, show_progress=False)
    for search in golden_beams:
        params = BeamSearchParams(
            beam_width=search["beam_width"], max_tokens=search["max_tokens"],
            length_penalty=search["length_penalty"], early_stopping=search["early_stopping"],
        )  # fmt: skip
        (output,) = llm.beam_search([search["prompt"]], params, use_tqdm=False)
        assert [list(completion.token_ids) for completion in output.outputs] == search["token_ids"]
        np.testing.assert_allclose([completion.score for completion in output.outputs], search["scores"], atol=1e-4)


# -- laws

LENGTHS = (5, 17, 30, 1, 16, 9)
INVARIANT = {"batch_invariant": True, "max_num_seqs": 20}
TIGHT = 21
"""Blocks of 8 tokens, the null block included: holds the largest of the searches and little more."""
KINDS = {
    "beams": beams(),
    "logprobs": beams(3, logprobs=2, length_penalty=0.0),
    "lists": beams(4, allowed_token_ids=[*range(100)], logit_bias={3: 1.5, 50: -2.0}, early_stopping=True, logprobs=1),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS)


@pytest.fixture(scope="module")
def ample(model, prompts) -> dict[str, Run]:
    return {kind: run(make_engine(model, **INVARIANT), prompts, params) for kind, params in KINDS.items()}


def scores_and_logprobs(made: Run) -> list:
    return [
        (completion.token_ids, completion.score, completion.logprobs)
        for output in made.outputs
        for completion in output.outputs
    ]


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_pressure_changes_no_bit(model, prompts, ample, kind, preemption) -> None:
    engine = make_engine(model, **INVARIANT, num_device_blocks=TIGHT, preemption=preemption)
    tight = run(engine, prompts, KINDS[kind])
    assert tight.stats.num_preemptions > 0
    assert (tight.stats.num_swapped_out_blocks > 0) == (preemption == "swap")
    assert scores_and_logprobs(tight) == scores_and_logprobs(ample[kind])


@pytest.mark.parametrize("options", [{"block_size": 4}, {"block_size": 16}, {"run_ahead": False}, {"max_num_seqs": 4}])
def test_hypotheses_do_not_depend_on_block_size_batch_or_loop(model, prompts, ample, options) -> None:
    engine = make_engine(model, **options, num_device_blocks=256 // options.get("block_size", 8) * 2)
    assert_near(run(engine, prompts, KINDS["beams"]), ample["beams"])


def test_beams_run_beside_samples_and_greedy_requests(model, prompts, ample) -> None:
    others = [SamplingParams(temperature=0, max_tokens=16), SamplingParams(temperature=1.0, n=3, seed=2, max_tokens=12)]
    alone = run(make_engine(model, **INVARIANT), prompts[:2], others)
    engine = make_engine(model, **INVARIANT, num_device_blocks=TIGHT)
    mixed = run(engine, [prompts[0], *prompts, prompts[1]], [others[0], *[KINDS["beams"]] * len(prompts), others[1]])
    assert [mixed.token_ids[0], mixed.token_ids[-1]] == alone.token_ids
    assert mixed.token_ids[1:-1] == ample["beams"].token_ids
    assert mixed.stats.num_preemptions > 0


def test_a_prompt_that_the_prefix_cache_knows_gives_the_same(model, prompts, ample) -> None:
    engine = make_engine(model, **INVARIANT)
    first = run(engine, prompts, KINDS["logprobs"])
    again = run(engine, prompts, KINDS["logprobs"])
    assert again.outputs[2].num_cached_tokens > 0
    assert scores_and_logprobs(again) == scores_and_logprobs(first) == scores_and_logprobs(ample["logprobs"])


# -- what a search is made of


def test_log_probabilities_add_up_to_the_score(model, prompts, ample) -> None:
    """Each is the model's own for its token; `top` holds it where it is among the likeliest."""
    for output in ample["logprobs"].outputs:
        for completion in output.outputs:
            entries = completion.logprobs
            assert [entry.token_id for entry in entries] == list(completion.token_ids)
            assert math.fsum(entry.logprob for entry in entries) == pytest.approx(completion.score, abs=1e-5)
            for entry in entries:
                if entry.rank <= 2:
                    token_id, logprob = entry.top[entry.rank - 1]
                    assert (token_id, logprob) == (entry.token_id, pytest.approx(entry.logprob, abs=1e-6))


def test_lists_of_a_request_bind_every_beam(model, prompts, ample) -> None:
    for output in ample["lists"].outputs:
        for completion in output.outputs:
            assert all(token_id < 100 for token_id in completion.token_ids)
            bias = sum({3: 1.5, 50: -2.0}.get(token_id, 0.0) for token_id in completion.token_ids)
            plain = math.fsum(entry.logprob for entry in completion.logprobs)
            # probabilities are the model's; what is added to a logit is added to a score
            assert completion.cumulative_logprob == pytest.approx(plain + bias, abs=1e-4)


def test_fewer_tokens_than_beams_are_as_many_beams(model) -> None:
    """Two tokens may be chosen: two beams after a step, four after two; eight are wanted and three tokens are left."""
    params = beams(8, allowed_token_ids=[3, 4], max_tokens=3, stop_token_ids=None)
    (output,) = run(make_engine(model), [[5, 6]], params).outputs
    assert len({completion.token_ids for completion in output.outputs}) == 8
    assert all(set(completion.token_ids) <= {3, 4} for completion in output.outputs)


def test_blocks_are_shared_and_copied_one_at_a_time(model) -> None:
    """A prompt of four whole blocks is held once by eight beams."""
    engine = make_engine(model, num_device_blocks=64)
    made = run(engine, random_prompts(1, (32,)), beams(8, max_tokens=8, stop_token_ids=None))
    assert made.outputs[0].metrics.num_shared_blocks >= 7 * 4
    assert made.stats.blocks_saved_fraction > 0.5
    assert made.stats.num_copied_blocks < 8 * 8, "fewer than one a beam and step"


def test_texts_end_at_stop_strings_and_stop_tokens_are_left_out() -> None:
    llm = LLM("demo", dtype="float32", num_device_blocks=256, max_num_seqs=8, show_progress=False)
    plain, stopped, included = (
        llm.beam_search("ROMEO:", BeamSearchParams(beam_width=4, max_tokens=12, **options), use_tqdm=False)[0]
        for options in ({}, {"stop": [" not"]}, {"stop": [" not"], "include_stop_str_in_output": True})
    )
    assert any(" not" in completion.text for completion in plain.outputs)
    ended = [completion for completion in stopped.outputs if completion.stop_reason == " not"]
    assert ended
    assert all(completion.finish_reason == "stop" for completion in ended)
    assert not any(" not" in completion.text for completion in stopped.outputs)
    assert any(completion.text.endswith(" not") for completion in included.outputs)
    assert all(len(completion.token_ids) == 12 for completion in plain.outputs)


def test_beams_leave_nothing_to_compile_after_warm_up() -> None:
    llm = LLM("demo", num_device_blocks=256, max_num_seqs=8, max_num_batched_tokens=16, show_progress=False)
    for params in (beams(4, stop_token_ids=None), beams(3, logprobs=1, stop_token_ids=[15])):
        llm.beam_search(["ROMEO:", "JULIET: What"], params, use_tqdm=False)
    assert llm.stats().num_compiles_after_warmup == 0


# -- the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width=0 is not allowed: it must be an integer from 1 to 64"),
        ({"beam_width": 10**6}, "beam_width=1000000 is not allowed"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"temperature": 0.7}, "temperature=0.7 is not allowed: it must be 0.0 .beam search is deterministic."),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"n": 2}, "n=2 is no field of BeamSearchParams"),
    ],
)
def test_values_that_no_search_can_have_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 4, "max_tokens": 8, **options})


def test_what_does_not_fit_this_engine_is_refused_before_it_waits(model) -> None:
    engine = make_engine(model, num_device_blocks=17)
    for params, message in (
        (beams(16), "beam_width=16 is above max_num_seqs=8: ask for fewer beams"),
        (beams(8, max_tokens=60), "can grow to 64 blocks .* beam_width=8.*but the pool has 16"),
        (beams(4, logit_bias={500: 1.0}), "logit_bias names token 500"),
        (beams(2, bad_words=["x"]), "bad_words need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request([1, 2, 3], params)
    with pytest.raises(ValueError, match="do not stream it"):
        engine.add_request([1, 2, 3], beams(2), is_streamed=True)
    assert not engine.has_unfinished


@pytest.mark.parametrize(("num_steps", "stops"), [(0, None), (1, None), (8, None), (8, [*range(0, 199, 3)])])
def test_an_aborted_search_gives_the_best_so_far_and_its_blocks_back(model, num_steps, stops) -> None:
    engine = make_engine(model, run_ahead=False)
    params = beams(4, max_tokens=50, stop_token_ids=None, logprobs=0, length_penalty=0.5)
    if stops:  # so many stop tokens that some hypotheses are finished by now
        params = beams(4, max_tokens=50, stop_token_ids=stops[:60], logprobs=0, length_penalty=2.0)
    request_id = engine.add_request([1, 2, 3], params)
    for _ in range(num_steps):
        engine.step()
    assert engine.abort(request_id)
    (output,) = engine.step()
    assert len(output.outputs) == (4 if num_steps else 1)
    assert {completion.finish_reason for completion in output.outputs} == ({"abort", "stop"} if stops else {"abort"})
    scores = [completion.score for completion in output.outputs]
    assert scores == sorted(scores, reverse=True)
    for completion in output.outputs:
        length = len(completion.token_ids)
        assert length == num_steps or completion.finish_reason == "stop"
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        total = math.fsum(entry.logprob for entry in completion.logprobs)
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-5)
        assert completion.score == pytest.approx(total / max(length, 1) ** params.length_penalty, abs=1e-5)
    drain(engine)


def test_weights_that_are_not_finite_end_the_search_in_an_error(model) -> None:
    bad = tiny_model(seed=3)
    bad[0].norm.scale[...] = bad[0].norm.scale[...].at[0].set(math.nan)
    (output,) = run(make_engine(bad), [[1, 2, 3]], beams(3)).outputs
    assert {completion.finish_reason for completion in output.outputs} == {"error"}
