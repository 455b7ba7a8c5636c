"""Beams that follow a grammar or meet a user's logits processors: held to a search stated anew, and to the laws."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from beam_reference import Reference
from harness import EOS, Run, drain, make_engine, random_prompts, run
from processors import PROCESSORS

from jaxpaged.engine import grammars
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

LENGTHS = (5, 17, 8, 40, 1, 16)
INVARIANT = {"batch_invariant": True, "max_num_seqs": 16}
TIGHT = 19
"""Blocks of 8 tokens, the null block included: the largest of the searches and little more."""
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["x", "yy"]}, "n": {"enum": [1, 2, 13]}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
CHOICES = ("to be", "to bear", 'a "quote"\n')


@dataclass(frozen=True)
class Language:
    """A set of texts, by predicates of a text: nothing here asks the library."""

    is_prefix: Callable[[str], bool]
    """Whether some text of the language begins so."""
    is_whole: Callable[[str], bool]
    is_end: Callable[[str], bool]
    """Whether it is whole, and no longer one begins so."""


def finite(texts: Sequence[str]) -> Language:
    """The language of these texts."""
    return Language(
        is_prefix=lambda text: any(one.startswith(text) for one in texts),
        is_whole=lambda text: text in texts,
        is_end=lambda text: text in texts and not any(one != text and one.startswith(text) for one in texts),
    )


class Replayed:
    """A form that is followed from its start for every question, and held to its language.

    Which of the tokens that spell a text are allowed is the library's to say: where only one text may follow, it
    allows the tokens that the tokenizer would make of it.
    """

    def __init__(self, tokenizer: Tokenizer, wanted: StructuredOutputsParams, language: Language) -> None:
        self.pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        self.language = language
        self.compiled = grammars.Grammars(tokenizer, tokenizer.vocab_size, (EOS,))
        self.start = self.compiled.compile(wanted)

    def matcher(self, outputs: list[int]):
        matcher = self.start.deep_copy()
        for token in outputs:
            assert matcher.consume_token(token)
        return matcher

    def text(self, outputs: list[int]) -> str:
        return "".join(self.pieces[token] for token in outputs if token != EOS)

    def allowed(self, outputs: list[int]) -> list[int]:
        words = self.compiled._library.mask(self.matcher(outputs))
        found = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        text = self.text(outputs)
        assert (EOS in found) == self.language.is_whole(text)
        assert all(self.language.is_prefix(text + self.pieces[token]) for token in found if token != EOS)
        return found

    def is_end(self, outputs: list[int]) -> bool:
        is_end = self.matcher(outputs).is_stopped()
        assert is_end == (self.language.is_end(self.text(outputs)) or outputs[-1] == EOS)
        return is_end


def balanced(text: str, *, is_whole: bool) -> bool:
    """Whether the text is (or begins) one of <a>, <b>, <(a)>, <((b))> ..."""
    match = re.fullmatch(r"<(\(*)(?:([ab])(\)*)(>?))?", text)
    if match is None:
        return text == "" and not is_whole
    opened, letter, closed, end = (group or "" for group in match.groups())
    is_closed = len(closed) == len(opened)
    return (bool(letter and end) and is_closed) if is_whole else len(closed) <= len(opened) and (not end or is_closed)


def balanced_whole(text: str) -> bool:
    return balanced(text, is_whole=True)


FORMS: dict[str, tuple[StructuredOutputsParams, Language]] = {
    "json": (
        StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
        finite([json.dumps({"kind": k, "n": n}, separators=(",", ":")) for k in ("x", "yy") for n in (1, 2, 13)]),
    ),
    "regex": (
        StructuredOutputsParams(regex="[a-c]{3,6}x?"),
        Language(
            lambda text: re.fullmatch("[a-c]{0,6}|[a-c]{3,6}x", text) is not None,
            lambda text: re.fullmatch("[a-c]{3,6}x?", text) is not None,
            lambda text: re.fullmatch("[a-c]{3,6}x", text) is not None,
        ),
    ),
    "choice": (StructuredOutputsParams(choice=CHOICES), finite(CHOICES)),
    "grammar": (
        StructuredOutputsParams(grammar='start: "<" inner ">"\ninner: /[ab]/ | "(" inner ")"'),
        Language(lambda text: balanced(text, is_whole=False), balanced_whole, balanced_whole),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def needs_library():
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")


@pytest.fixture(scope="module")
def reference(model, tokenizer) -> Reference:
    return Reference(model, EOS)


def replayed(tokenizer, kind: str) -> Replayed:
    return Replayed(tokenizer, *FORMS[kind])


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS, 1024)


def forms(kind: str, width: int = 4, **options) -> BeamSearchParams:
    max_tokens = 24 if kind == "json" else 14
    wanted = {"beam_width": width, "max_tokens": max_tokens, "structured_outputs": FORMS[kind][0]}
    return BeamSearchParams(**wanted | options)


def assert_found(output, expected) -> None:
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _, _ in expected]
    assert [completion.finish_reason for completion in output.outputs] == [reason for _, _, reason in expected]
    # float32 against a dense forward, summed in float64
    np.testing.assert_allclose(
        [completion.score for completion in output.outputs], [score for _, score, _ in expected], atol=1e-4
    )


# -- a search stated anew

OPTIONS = (
    {},
    {"width": 3, "length_penalty": 0.0, "early_stopping": True},
    {"width": 6, "length_penalty": 2.0, "ignore_eos": True, "max_tokens": 7},
)


@pytest.mark.parametrize("kind", FORMS)
def test_hypotheses_are_those_of_a_search_over_full_forwards_and_follow_the_form(
    model, tokenizer, reference, prompts, kind
) -> None:
    params = [forms(kind, **options) for options in OPTIONS for _ in range(2)]
    chosen = [prompts[0], prompts[3]] * len(OPTIONS)
    got = run(make_engine(model, tokenizer, **INVARIANT), chosen, params)
    language, form = FORMS[kind][1], replayed(tokenizer, kind)
    num_stopped = 0
    for output, prompt, asked in zip(got.outputs, chosen, params, strict=True):
        assert_found(output, reference.search(prompt, asked, form=form))
        for completion in output.outputs:
            is_stopped = completion.finish_reason == "stop"
            num_stopped += is_stopped
            assert language.is_whole(completion.text) if is_stopped else language.is_prefix(completion.text)
            if completion.stop_reason is not None:
                assert (completion.stop_reason, completion.token_ids[-1]) == (EOS, EOS)
    assert num_stopped > 6
    ends = {c.stop_reason for output in got.outputs for c in output.outputs if c.finish_reason == "stop"}
    assert EOS in ends or kind not in ("regex", "choice"), "a text that could go on is ended by the end token, too"


def singles(tokenizer, letters: str) -> list[int]:
    return [token for token in range(300) if tokenizer.decode([token]) in tuple(letters)]


def test_a_language_of_few_texts_gives_no_more_hypotheses_than_it_has(model, tokenizer, reference, prompts) -> None:
    """Spelled with single letters only, two texts are two hypotheses, of the four that are wanted."""
    wanted, allowed = StructuredOutputsParams(regex="a[bc]"), singles(tokenizer, "abc")
    params = BeamSearchParams(beam_width=4, max_tokens=9, structured_outputs=wanted, allowed_token_ids=allowed)
    (output,) = run(make_engine(model, tokenizer, **INVARIANT), prompts[:1], params).outputs
    assert sorted(completion.text for completion in output.outputs) == ["ab", "ac"]
    form = Replayed(tokenizer, wanted, finite(["ab", "ac"]))
    assert_found(output, reference.search(prompts[0], params, form=form))


def test_a_beam_that_everything_is_forbidden_to_dies_alone(model, tokenizer, prompts) -> None:
    """After "a" only "x" or "y" may come, which are not allowed; after "b" the text goes on."""
    wanted, allowed = StructuredOutputsParams(regex="a[xy]|b[bc]{4}"), singles(tokenizer, "abc")
    params = BeamSearchParams(beam_width=4, max_tokens=9, structured_outputs=wanted, allowed_token_ids=allowed)
    (output,) = run(make_engine(model, tokenizer, **INVARIANT), prompts[:1], params).outputs
    assert {completion.finish_reason for completion in output.outputs} == {"stop"}
    assert len({completion.text for completion in output.outputs}) == 4
    assert all(re.fullmatch("b[bc]{4}", completion.text) for completion in output.outputs)


def test_where_everything_is_forbidden_to_every_beam_the_request_ends_in_an_error_that_names_why(
    model, tokenizer, prompts
) -> None:
    wanted, allowed = StructuredOutputsParams(regex="a[xy]"), singles(tokenizer, "a")
    bad = BeamSearchParams(beam_width=2, max_tokens=9, structured_outputs=wanted, allowed_token_ids=allowed)
    plain = SamplingParams(temperature=0, max_tokens=6)
    alone = run(make_engine(model, tokenizer, **INVARIANT), prompts[1:2], plain)
    got = run(make_engine(model, tokenizer, **INVARIANT), prompts[:2], [bad, plain])
    assert got.token_ids[1] == alone.token_ids[0]
    for completion in got.outputs[0].outputs:
        assert completion.finish_reason == "error"
        assert re.search("every token is forbidden.*allowed_token_ids.*structured_outputs", completion.stop_reason)


# -- laws

MIXED = [
    forms("json", logprobs=1),
    SamplingParams(temperature=0, max_tokens=16, logprobs=1),
    forms("regex", 3, logprobs=1),
    forms("grammar", 4, length_penalty=0.0, logprobs=2),
    SamplingParams(
        temperature=0.9, seed=3, n=2, max_tokens=16, logprobs=1, structured_outputs=FORMS["regex"][0]
    ),
    forms("choice", 5, logprobs=1),
]


def told(made: Run) -> list:
    return [
        (completion.token_ids, completion.text, completion.score, completion.logprobs, completion.finish_reason)
        for output in made.outputs
        for completion in output.outputs
    ]


@pytest.fixture(scope="module")
def ample(model, tokenizer, prompts) -> Run:
    return run(make_engine(model, tokenizer, **INVARIANT), prompts, MIXED)


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_pressure_changes_no_bit(model, tokenizer, prompts, ample, preemption, run_ahead) -> None:
    options = INVARIANT | {"num_device_blocks": TIGHT, "preemption": preemption, "run_ahead": run_ahead}
    tight = run(make_engine(model, tokenizer, **options), prompts, MIXED)
    assert tight.stats.num_preemptions > 0
    assert any(
        output.metrics.num_preemptions > 0 for output, params in zip(tight.outputs, MIXED, strict=True)
        if isinstance(params, BeamSearchParams)
    )
    assert told(tight) == told(ample)


def test_neither_company_nor_the_prefix_cache_changes_a_bit(model, tokenizer, prompts, ample) -> None:
    engine = make_engine(model, tokenizer, **INVARIANT)
    for index, (prompt, params) in enumerate(zip(prompts, MIXED, strict=True)):
        alone = run(engine, [prompt], params)
        assert told(alone) == told(Run((ample.outputs[index],), ample.stats))
    again = run(engine, [prompts[3]], MIXED[3])
    assert again.outputs[0].num_cached_tokens > 0
    assert told(again) == told(Run((ample.outputs[3],), ample.stats))


def test_nothing_compiles_after_warm_up(model, tokenizer, prompts, ample) -> None:
    engine = make_engine(model, tokenizer, num_device_blocks=TIGHT, **INVARIANT)
    ids = [engine.add_request(prompt, params) for prompt, params in zip(prompts, MIXED, strict=True)]
    numbers = engine.num_candidates(ids)
    engine.warm_up(engine.runner.shapes.buckets.all, num_candidates=numbers, with_extended=True)
    engine.warm_up_preemption()
    while engine.has_unfinished:
        engine.step()
    drain(engine)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_compiles_after_warmup == 0


def test_states_of_dropped_beams_are_let_go(model, tokenizer, prompts) -> None:
    engine = make_engine(model, tokenizer)
    wanted = StructuredOutputsParams(regex="[a-z ]{30,60}")
    params = BeamSearchParams(beam_width=4, max_tokens=40, structured_outputs=wanted)
    request_id = engine.add_request(prompts[0], params)
    most = 0
    while engine.has_unfinished:
        engine.step()
        if engine.has_unfinished:
            most = max(most, len(engine._grammars._beams[request_id]._kept))
    assert 4 < most <= 2 * 4 * 2  # of two lengths, no more than are looked at
    assert not engine._grammars._beams
    assert not engine._grammars._states
    drain(engine)


@pytest.mark.parametrize("where", ["mask", "_consume"])
def test_a_grammar_that_fails_half_way_ends_its_search_alone(model, tokenizer, prompts, monkeypatch, where) -> None:
    engine = make_engine(model, tokenizer, **INVARIANT)
    good, bad = forms("regex"), BeamSearchParams(
        beam_width=3, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[p-w ]{20,30}")
    )
    plain = SamplingParams(temperature=0, max_tokens=9)
    alone = run(engine, [prompts[0], prompts[1]], [good, plain])
    real = grammars._Library.mask if where == "mask" else grammars._consume
    num_bad = []

    def failing(*arguments):
        matcher = arguments[1 if where == "mask" else 0]
        request_id = next((r for r in engine._grammars._of_request if r not in good_ids), None)
        kept = engine._grammars._beams[request_id]._kept.values() if request_id else ()
        is_bad = any(matcher is one for one in kept) if where == "mask" else arguments[1] in bad_tokens
        num_bad.extend([1] * is_bad)
        if len(num_bad) > 7 and is_bad:
            raise grammars.GrammarError("structured_outputs: a limit was met")
        return real(*arguments)

    bad_tokens = {token for token in range(1024) if re.fullmatch("[p-w ]+", tokenizer.decode([token]))}
    good_ids = {engine.add_request(prompts[0], good), engine.add_request(prompts[1], plain)}
    bad_id = engine.add_request(prompts[3], bad)
    if where == "mask":
        monkeypatch.setattr(grammars._Library, "mask", failing)
    else:
        monkeypatch.setattr(grammars, "_consume", failing)
    ended = {}
    while engine.has_unfinished:
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    drain(engine)
    for completion in ended[bad_id].outputs:
        assert completion.finish_reason == "error"
        assert re.search("structured_outputs: a limit was met", completion.stop_reason)
    assert [ended[one].outputs[0].token_ids for one in sorted(good_ids)] == [ids[0] for ids in alone.token_ids]


def test_a_bad_grammar_is_refused_at_the_door(model, tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    for wanted, message in (
        (StructuredOutputsParams(regex="a("), "structured_outputs: regex cannot be compiled.*unclosed"),
        (StructuredOutputsParams(regex="()"), "structured_outputs: no token can satisfy regex"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request([5, 6], BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs=wanted))
    with pytest.raises(ValueError, match="structured_outputs='a' is not allowed"):
        BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs="a")
    assert not engine.has_unfinished


# -- logits processors

ASKED = {"forbid_repeats": {"window": 100}, "favour": {"ids": [5, 9, 77, 300], "bonus": 2.5}}
EDITED = [
    BeamSearchParams(beam_width=4, max_tokens=10, logits_processors=ASKED, logprobs=1),
    BeamSearchParams(beam_width=3, max_tokens=14, logits_processors={"forbid_repeats": {}}, logprobs=1),
    SamplingParams(temperature=0, max_tokens=12, logprobs=1),
    forms("regex", 4, logits_processors={"forbid_repeats": {"window": 3}}, logprobs=1),
    SamplingParams(temperature=0.8, seed=4, n=2, max_tokens=12, logits_processors=ASKED, logprobs=1),
    BeamSearchParams(beam_width=4, max_tokens=12, logprobs=1),
]


def edit(asked):
    """What the processors above do, in numpy."""

    def edited(logits, prompt, outputs):
        logits = logits.copy()
        if "forbid_repeats" in asked:
            logits[[*prompt, *outputs][-asked["forbid_repeats"].get("window", 8) :]] = -np.inf
        if "favour" in asked:
            np.add.at(logits, list(asked["favour"]["ids"]), asked["favour"]["bonus"])
        return logits

    return edited


@pytest.fixture(scope="module")
def edited_ample(model, tokenizer, prompts) -> Run:
    engine = make_engine(model, tokenizer, logits_processors=PROCESSORS, **INVARIANT)
    return run(engine, prompts, EDITED)


def test_processors_see_each_beams_own_tokens(tokenizer, reference, prompts, edited_ample) -> None:
    for index in (0, 1, 3, 5):
        params = EDITED[index]
        asked = {name: dict(arguments) for name, arguments in params.logits_processors or ()}
        form = replayed(tokenizer, "regex") if params.structured_outputs else None
        expected = reference.search(prompts[index], params, form=form, edit=edit(asked))
        assert_found(edited_ample.outputs[index], expected)


def test_a_beam_whose_best_continuation_ends_remembers_the_token_it_went_on_with(
    model, tokenizer, reference, prompts
) -> None:
    """The device draws the favoured stop token for it, and a processor must not find that among its tokens."""
    asked = {"forbid_repeats": {"window": 100}, "favour": {"ids": [300, 300, 300, 5], "bonus": 1.0}}
    params = BeamSearchParams(
        beam_width=3, max_tokens=10, stop_token_ids=[300], length_penalty=2.0, logits_processors=asked,
        allowed_token_ids=[*range(50, 62), 300],
    )
    got = run(make_engine(model, tokenizer, logits_processors=PROCESSORS, **INVARIANT), prompts, params)
    num_ended = 0
    for output, prompt in zip(got.outputs, prompts, strict=True):
        assert_found(output, reference.search(prompt, params, edit=edit(asked)))
        for completion in output.outputs:
            assert len(set(completion.token_ids)) == len(completion.token_ids)
            num_ended += completion.token_ids[-1] == 300
    assert num_ended > 3
    assert any(len(completion.token_ids) > 2 for output in got.outputs for completion in output.outputs)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_pressure_changes_no_bit_of_edited_beams(model, tokenizer, prompts, edited_ample, preemption) -> None:
    options = INVARIANT | {"num_device_blocks": TIGHT, "preemption": preemption}
    engine = make_engine(model, tokenizer, logits_processors=PROCESSORS, **options)
    tight = run(engine, prompts, EDITED)
    assert tight.stats.num_preemptions > 0
    assert told(tight) == told(edited_ample)


def test_a_processor_that_gives_nan_ends_its_search_alone(model, tokenizer, prompts, edited_ample) -> None:
    bad = BeamSearchParams(beam_width=4, max_tokens=10, logits_processors={"late_nan": {}, "favour": {}})
    engine = make_engine(model, tokenizer, logits_processors=PROCESSORS, **INVARIANT)
    got = run(engine, [*prompts, prompts[2]], [*EDITED, bad])
    assert told(Run(got.outputs[:-1], got.stats)) == told(edited_ample)
    for completion in got.outputs[-1].outputs:
        assert completion.finish_reason == "error"
        assert "logits_processors['late_nan'] gave logits that are NaN" in completion.stop_reason
        assert len(completion.token_ids) == 3


def test_unknown_processors_and_arguments_are_refused_at_the_door(model, tokenizer) -> None:
    engine = make_engine(model, tokenizer, logits_processors=PROCESSORS)
    for asked, message in (({"other": {}}, "names 'other'"), ({"favour": {"bonus": [1.0]}}, "has the shape")):
        with pytest.raises(ValueError, match=message):
            engine.add_request([1], BeamSearchParams(beam_width=2, max_tokens=4, logits_processors=asked))
    assert not engine.has_unfinished


# -- what is reported


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_log_probabilities_are_raw_or_processed_by_choice(model, tokenizer, reference, prompts, mode) -> None:
    engine = make_engine(model, tokenizer, logits_processors=PROCESSORS, logprobs_mode=mode, **INVARIANT)
    params = forms("regex", 3, logits_processors={"favour": ASKED["favour"]}, logit_bias={66: 1.5}, logprobs=2)
    (output,) = run(engine, prompts[:1], params).outputs
    form = replayed(tokenizer, "regex")
    for completion in output.outputs:
        for index, entry in enumerate(completion.logprobs):
            before = list(completion.token_ids[:index])
            shown = reference.logits((*prompts[0], *before)).copy()
            if mode.startswith("processed"):
                shown = edit({"favour": ASKED["favour"]})(shown, prompts[0], before)
                shown[66] += 1.5
                masked = np.full_like(shown, -np.inf)
                allowed = form.allowed(before)
                masked[allowed] = shown[allowed]
                shown = masked
            if mode.endswith("logprobs"):
                shown = shown - shown.max() - np.log(np.exp(shown - shown.max()).sum())
            # float32 against a dense forward
            assert entry.logprob == pytest.approx(shown[entry.token_id], abs=1e-4)
            least, most = (1 + int((shown > shown[entry.token_id] + margin).sum()) for margin in (1e-4, -1e-4))
            assert least <= entry.rank <= most
            for token, value in entry.top:
                assert value == pytest.approx(shown[token], abs=1e-4)
            if entry.rank <= 2:
                assert entry.top[entry.rank - 1] == (entry.token_id, pytest.approx(entry.logprob, abs=1e-6))
