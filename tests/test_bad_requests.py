"""Contradictory and impossible requests: refused by name, or ended alone in an error that names the parameter."""

import re

import jax.numpy as jnp
import pytest
from harness import drain, finish, make_engine, random_prompts, run

from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

INVARIANT = {"batch_invariant": True, "num_device_blocks": 40}
GOOD = [SamplingParams(temperature=0, max_tokens=12), SamplingParams(temperature=1, seed=3, n=2, max_tokens=12)]


def nan(logits, context):
    return logits * jnp.nan


def nothing(logits, context):
    return jnp.full_like(logits, -jnp.inf)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return make_engine(model, tokenizer, {"nan": nan, "nothing": nothing}, **INVARIANT)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, (9, 17), 1024)


REFUSED = {
    "more beams than rows": (lambda: BeamSearchParams(beam_width=9, max_tokens=4), "beam_width=9 is above"),
    "more beams than anyone has": (lambda: BeamSearchParams(beam_width=10**6, max_tokens=4), "beam_width=1000000"),
    "more samples than rows": (lambda: SamplingParams(n=9), "n=9 is above max_num_seqs"),
    "more tokens than blocks": (lambda: SamplingParams(n=8, max_tokens=100), "n=8"),
    "more tokens of beams than blocks": (lambda: BeamSearchParams(beam_width=8, max_tokens=100), "beam_width=8"),
    "tokens without end": (lambda: SamplingParams(max_tokens=2**63), "max_tokens"),
    "beams with a temperature": (lambda: BeamSearchParams(beam_width=2, max_tokens=4, temperature=0.5), "temperature"),
    "no token allowed": (lambda: SamplingParams(allowed_token_ids=[]), "allowed_token_ids"),
    "no token allowed to beams": (
        lambda: BeamSearchParams(beam_width=2, max_tokens=4, allowed_token_ids=[]), "allowed_token_ids",
    ),
    "an unknown processor": (lambda: SamplingParams(logits_processors={"x": {}}), "logits_processors names 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_nothing_is_queued(engine, case) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        engine.add_request([5, 6, 7], make())
    assert not engine.has_unfinished
    drain(engine)


BAD_WORDS = {"allowed_token_ids": [66, 67], "bad_words": ["a", "b"], "ignore_eos": True}
FORM = {"structured_outputs": StructuredOutputsParams(regex="[x-z]{2,}"), "allowed_token_ids": [66, 67]}
ENDED = {
    "bad words that forbid everything": (BAD_WORDS, "bad_words"),
    "a form of which no token is allowed": (FORM, "structured_outputs"),
    "a processor that gives NaN": ({"logits_processors": {"nan": {}}}, r"logits_processors\['nan'\]"),
    "a processor that bans everything": ({"logits_processors": {"nothing": {}}}, r"logits_processors\['nothing'\]"),
}


@pytest.mark.parametrize("kind", ["greedy", "samples", "beams"])
@pytest.mark.parametrize("case", ENDED)
def test_what_leaves_no_token_ends_alone_in_an_error_that_names_it(engine, prompts, case, kind) -> None:
    options, message = ENDED[case]
    if "structured_outputs" in options:
        pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")
    kinds = {
        "greedy": lambda **options: SamplingParams(temperature=0, max_tokens=8, **options),
        "samples": lambda **options: SamplingParams(n=3, seed=1, max_tokens=8, **options),
        "beams": lambda **options: BeamSearchParams(beam_width=3, max_tokens=8, **options),
    }
    alone = run(engine, prompts, GOOD)
    ids = [engine.add_request(prompt, params) for prompt, params in zip(prompts, GOOD, strict=True)]
    bad = engine.add_request([5, 6, 7, 8], kinds[kind](**options))
    ended = finish(engine)  # which audits the pools
    for completion in ended[bad].outputs:
        assert completion.finish_reason == "error"
        assert re.search(message, completion.stop_reason)
    for request_id, before in zip(ids, alone.outputs, strict=True):
        assert [c.token_ids for c in ended[request_id].outputs] == [c.token_ids for c in before.outputs]
