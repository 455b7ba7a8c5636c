"""A lexer is shared by all who follow a form and holds so many states: whoever finds it full must not notice."""

import pytest
from harness import make_engine, run

from jaxpaged.engine import grammars
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")

FORM = StructuredOutputsParams(regex="|".join(f"{letter}[a-z]{{60}}{letter.upper()}" for letter in "abcdefghijklmnop"))
"""Each first letter leads to 62 states of its own."""
PROMPT = [5, 17, 9]
OPTIONS = {"max_tokens": 70, "structured_outputs": FORM}
ASKED = [
    *(SamplingParams(temperature=1.5, seed=seed, n=2, **OPTIONS) for seed in range(6)),
    *(BeamSearchParams(beam_width=3, logit_bias={token: 9.0}, **OPTIONS) for token in (66, 70, 75)),  # a, e, j
]


def engine_of(model, tokenizer):
    return make_engine(model, tokenizer, max_num_seqs=24, batch_invariant=True)


def results(model, tokenizer) -> list:
    """Of requests that come one after the other and of all together, so that they follow one form in one engine."""
    engine = engine_of(model, tokenizer)
    made = [run(engine, [PROMPT], params) for params in ASKED]
    made.append(run(engine, [PROMPT] * len(ASKED), ASKED))
    return [
        [(completion.text, completion.finish_reason, completion.stop_reason) for completion in output.outputs]
        for one in made
        for output in one.outputs
    ]


def test_a_full_lexer_changes_no_output(model, tokenizer, monkeypatch) -> None:
    ample = results(model, tokenizer)
    renewals = []
    renew = grammars.Grammars._renew
    monkeypatch.setattr(
        grammars.Grammars, "_renew", lambda of, sequence: renewals.append(sequence) or renew(of, sequence)
    )
    monkeypatch.setitem(grammars.LIMITS, "max_lexer_states", 300)
    tight = results(model, tokenizer)
    assert any(sequence.request.beams for sequence in renewals)
    assert any(not sequence.request.beams for sequence in renewals)
    assert tight == ample
    assert {reason for output in ample for _, reason, _ in output} == {"stop"}
    assert len({text[0] for output in ample for text, _, _ in output}) > 6, "states of many first letters are met"


def test_a_form_that_needs_more_than_a_lexer_holds_ends_its_request_alone(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(grammars.LIMITS, "max_lexer_states", 300)
    engine = engine_of(model, tokenizer)
    hungry = StructuredOutputsParams(regex="(.{0,50}x){0,50}y.{100}")
    asked = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=100, structured_outputs=hungry),
        SamplingParams(temperature=0, max_tokens=20),
    ]
    failed, plain = run(engine, [PROMPT] * 2, asked).outputs
    assert failed.outputs[0].finish_reason == "error"
    assert "structured_outputs: " in failed.outputs[0].stop_reason
    assert "too many states" in failed.outputs[0].stop_reason
    assert plain.outputs[0].finish_reason == "length"
