"""Grammars in the engine: the outputs follow them, nobody else notices, and bad ones are refused at the door."""

import json
import re
import sys

import numpy as np
import pytest
from harness import EOS, drain, make_engine, random_prompts, run

from jaxpaged.engine import grammars
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.structured_outputs import StructuredOutputsParams

LENGTHS = (5, 17, 8, 30, 1, 16, 9, 40)
TIGHT = 17
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["x", "yy"]},
        "tags": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
BALANCED = 'start: "<" inner ">"\ninner: /[ab]/ | "(" inner ")"'


CHOICES = ("to be", "not to be", 'a "quote"\n')


def form(**given):
    return StructuredOutputsParams(**given)


def ask(wanted, **options):
    return SamplingParams(**({"max_tokens": 48, "structured_outputs": wanted, "logprobs": 1} | options))


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS, 1024)


@pytest.fixture
def needs_library():
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")


def texts(output):
    return [completion.text for completion in output.outputs]


def is_balanced(text):
    return re.fullmatch(r"<(\(*)[ab](\)*)>", text) is not None and text.count("(") == text.count(")")


def fits_schema(text):
    value = json.loads(text)
    return (
        list(value) == ["name", "kind", "tags"]
        and len(value["name"]) <= 4
        and value["kind"] in ("x", "yy")
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {1, 2}
    )


FORMS = {
    "json": (form(json=SCHEMA, disable_any_whitespace=True), fits_schema),
    "json text": (form(json=json.dumps(SCHEMA), whitespace_pattern=" ?"), fits_schema),
    "regex": (form(regex="[a-c]{3,9}x"), lambda text: re.fullmatch("[a-c]{3,9}x", text) is not None),
    "choice": (form(choice=CHOICES), lambda text: text in CHOICES),
    "grammar": (form(grammar=BALANCED), is_balanced),
}


@pytest.mark.usefixtures("needs_library")
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 3}], ids=["greedy", "n3"])
def test_an_output_that_ends_follows_its_form(model, tokenizer, prompts, options):
    params = [ask(wanted, **options) for wanted, _ in FORMS.values()]
    got = run(make_engine(model, tokenizer), prompts[: len(params)], params)
    num_ended = 0
    for output, (name, (_, is_right)) in zip(got.outputs, FORMS.items(), strict=True):
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "stop":
                num_ended += 1
                assert is_right(completion.text), f"{name}: {completion.text!r}"
    assert num_ended >= 4 * options.get("n", 1)


@pytest.mark.usefixtures("needs_library")
def test_any_json_object_is_one_as_far_as_it_goes(model, tokenizer, prompts):
    wanted = form(json_object=True, disable_any_whitespace=True)
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=60, structured_outputs=wanted, n=4)
    got = run(make_engine(model, tokenizer), prompts[:4], params)
    for output in got.outputs:
        for completion in output.outputs:
            assert completion.text.startswith("{")
            if completion.finish_reason == "stop":
                assert isinstance(json.loads(completion.text), dict)


# ---- laws

MIXED = [
    ask(FORMS["json"][0], temperature=0.9, seed=1),
    SamplingParams(temperature=0, max_tokens=24, logprobs=1),
    ask(FORMS["grammar"][0], temperature=1.0, seed=2, n=2),
    ask(form(regex="[a-z ]{30,40}"), temperature=0),
    SamplingParams(temperature=0.7, seed=9, max_tokens=24, logprobs=1),
    ask(form(regex="[a-z ]{30,40}"), temperature=1.0, seed=3),
    ask(FORMS["json"][0], temperature=1.0, seed=4, n=2),
    ask(FORMS["regex"][0], temperature=0),
]


@pytest.fixture(scope="module")
def ample(model, tokenizer, prompts):
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")
    return run(make_engine(model, tokenizer, batch_invariant=True), prompts, MIXED)


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_pressure_changes_no_bit(model, tokenizer, prompts, ample, preemption, run_ahead):
    engine = make_engine(
        model, tokenizer, batch_invariant=True, num_device_blocks=TIGHT, preemption=preemption, run_ahead=run_ahead
    )
    tight = run(engine, prompts, MIXED)
    assert tight.stats.num_preemptions > 0
    assert tight.token_ids == ample.token_ids
    assert tight.logprobs == ample.logprobs
    assert [texts(output) for output in tight.outputs] == [texts(output) for output in ample.outputs]


def test_company_changes_no_bit(model, tokenizer, prompts, ample):
    engine = make_engine(model, tokenizer, batch_invariant=True)
    for index in range(len(prompts)):
        alone = run(engine, [prompts[index]], MIXED[index])
        assert alone.token_ids[0] == ample.token_ids[index]
        assert alone.logprobs[0] == ample.logprobs[index]
    assert run(engine, [prompts[7]], MIXED[7]).outputs[0].num_cached_tokens > 0  # and so does the prefix cache


def test_nothing_compiles_after_warm_up(model, tokenizer, prompts, ample):
    engine = make_engine(model, tokenizer, num_device_blocks=TIGHT)
    engine.warm_up(engine.runner.shapes.buckets.all, with_extended=engine.needs_extended_sampler(None))
    engine.warm_up_preemption()
    got = run(engine, prompts, MIXED)
    assert got.stats.num_preemptions > 0
    assert got.stats.num_compiles_after_warmup == 0


def test_a_step_without_grammars_makes_no_mask(model, tokenizer, prompts, ample, monkeypatch):
    engine = make_engine(model, tokenizer)
    monkeypatch.setattr(engine._grammars, "masks", None)  # whoever calls it fails
    got = run(engine, prompts[:2], SamplingParams(temperature=0.5, seed=1, max_tokens=4))
    assert {c.finish_reason for output in got.outputs for c in output.outputs} == {"length"}


# ---- beside other parameters


@pytest.mark.usefixtures("needs_library")
def test_a_form_holds_beside_other_parameters(model, tokenizer, prompts):
    wanted = form(regex="[a-z]{4,20}")
    cases = {
        "stop": ask(wanted, temperature=1.0, seed=1, stop=["e"], n=2),
        "bad_words": ask(wanted, temperature=1.0, seed=1, bad_words=["a", "the"], n=2),
        "penalties": ask(wanted, temperature=0, repetition_penalty=1.9, presence_penalty=2.0, frequency_penalty=1.0),
        "min_tokens": ask(form(regex="[a-z]{1,400}"), temperature=1.0, seed=1, min_tokens=20, n=2),
        "top": ask(wanted, temperature=2.0, seed=1, top_k=5, top_p=0.9, min_p=0.01),
        "ignore_eos": ask(wanted, temperature=0, ignore_eos=True),
        "no text": ask(wanted, temperature=0, detokenize=False),
        "prompt_logprobs": ask(wanted, temperature=0, prompt_logprobs=1),
    }
    got = dict(zip(cases, run(make_engine(model, tokenizer), prompts, list(cases.values())).outputs, strict=True))
    assert {c.finish_reason for name, o in got.items() for c in o.outputs if name != "min_tokens"} == {"stop"}
    for name, output in got.items():
        for completion in output.outputs:
            text = tokenizer.decode(completion.token_ids) if name == "no text" else completion.text
            assert re.fullmatch("[a-z]{0,400}" if name in ("stop", "min_tokens") else "[a-z]{4,20}", text), name
            assert len(completion.logprobs) == len(completion.token_ids)
    assert all("e" not in text for text in texts(got["stop"]))
    assert all(len(completion.token_ids) >= 20 for completion in got["min_tokens"].outputs)
    assert None not in got["prompt_logprobs"].prompt_logprobs[1:]


@pytest.mark.usefixtures("needs_library")
def test_a_form_that_other_parameters_forbid_ends_its_request_alone(model, tokenizer, prompts):
    plain = SamplingParams(temperature=0, max_tokens=8)
    forbidden = ask(form(regex="[a-c]+"), allowed_token_ids=tokenizer.encode("xyz", add_special_tokens=False))
    engine = make_engine(model, tokenizer, batch_invariant=True)
    alone = run(engine, prompts[:2], plain)
    got = run(engine, [prompts[0], prompts[3], prompts[1]], [plain, forbidden, plain])
    assert [got.token_ids[0], got.token_ids[2]] == alone.token_ids
    (completion,) = got.outputs[1].outputs
    assert completion.finish_reason == "error"
    assert "every token is forbidden" in completion.stop_reason
    assert "structured_outputs" in completion.stop_reason


@pytest.mark.usefixtures("needs_library")
@pytest.mark.parametrize("where", ["mask", "read"])
def test_a_grammar_that_fails_half_way_ends_its_request_alone(model, tokenizer, prompts, monkeypatch, where):
    engine = make_engine(model, tokenizer, batch_invariant=True)
    good, bad = ask(FORMS["regex"][0], temperature=0), ask(form(regex="[a-z ]{30,40}"), temperature=0)
    alone = run(engine, [prompts[0], prompts[1]], [good, SamplingParams(temperature=0, max_tokens=9)])
    kind, name = (grammars._Library, "mask") if where == "mask" else (grammars._State, "read")
    real, calls = getattr(kind, name), []
    # the third call that is about the bad grammar fails, and no other
    bad_grammar = engine._grammars.compile(bad.structured_outputs)
    lengths = {}

    def failing(self, argument):
        matcher = argument if where == "mask" else self.matcher
        is_bad = any(
            state.matcher is matcher
            for request_id, states in engine._grammars._states.items()
            for state in states.values()
            if engine._grammars._of_request[request_id] is bad_grammar
        )
        calls.append(is_bad)
        lengths[where] = sum(calls)
        if is_bad and sum(calls) >= 3:
            raise grammars.GrammarError("a limit was met")
        return real(self, argument)

    monkeypatch.setattr(kind, name, failing)
    got = run(
        engine, [prompts[0], prompts[3], prompts[1]], [good, bad, SamplingParams(temperature=0, max_tokens=9)]
    )
    assert [got.token_ids[0], got.token_ids[2]] == alone.token_ids
    (completion,) = got.outputs[1].outputs
    assert completion.finish_reason == "error"
    assert "a limit was met" in completion.stop_reason
    drain(engine)


# ---- the door

REFUSED = {
    "not a schema": (form(json={"type": "thing"}), "json cannot be compiled.*thing"),
    "unknown reference": (form(json={"$ref": "#/nowhere"}), "json cannot be compiled.*nowhere"),
    "reference outside": (form(json={"$ref": "http://localhost/x"}), "json cannot be compiled.*localhost"),
    "nothing fits": (form(json={"enum": []}), "json cannot be compiled.*Unsatisfiable"),
    "contradiction": (form(json={"type": "string", "minLength": 5, "maxLength": 2}), "json cannot be compiled"),
    "not supported": (form(json={"type": "array", "uniqueItems": True}), "json cannot be compiled.*uniqueItems"),
    "lenient": (form(json={"uniqueItems": True, "type": "array", "x-guidance": {"lenient": True}}), "uniqueItems"),
    "look-ahead": (form(regex="(?=a)b"), "regex cannot be compiled.*look-around"),
    "open group": (form(regex="a("), "regex cannot be compiled.*unclosed"),
    "empty language": (form(regex=r"[^\x00-\x{10FFFF}]"), "no token can satisfy regex"),
    "empty text": (form(regex="()"), "no token can satisfy regex"),
    "rules of another manner": (form(grammar='root ::= "a"'), "grammar cannot be compiled.*start: ..., not root ::="),
    "unknown rule": (form(grammar="start: other"), "grammar cannot be compiled.*other"),
    "no start": (form(grammar='other: "a"'), "grammar cannot be compiled.*start"),
    "not Lark": (form(grammar='root ::= "a"'), "grammar cannot be compiled"),
}


@pytest.mark.usefixtures("needs_library")
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_grammar_is_refused_with_the_reason_before_anything_is_queued(model, tokenizer, case):
    wanted, message = REFUSED[case]
    engine = make_engine(model, tokenizer)
    with pytest.raises(ValueError, match=f"structured_outputs: .*{message}") as refusal:
        engine.add_request([5, 6], SamplingParams(structured_outputs=wanted))
    assert len(str(refusal.value)) < 600
    assert not engine.has_unfinished
    drain(engine)


@pytest.mark.usefixtures("needs_library")
def test_grammars_are_compiled_once_and_the_oldest_is_forgotten(tokenizer, monkeypatch):
    compiled = grammars.Grammars(tokenizer, tokenizer.vocab_size, (EOS,))
    monkeypatch.setattr(grammars, "MAX_COMPILED", 3)
    wanted = [form(regex=f"a{{{i}}}b") for i in range(1, 5)]
    first = compiled.compile(wanted[0])
    assert compiled.compile(form(regex="a{1}b")) is first
    for one in wanted[1:3]:
        compiled.compile(one)
    assert compiled.compile(wanted[0]) is first  # used again, so no longer the oldest
    compiled.compile(wanted[3])
    assert list(compiled._compiled) == [wanted[2], wanted[0], wanted[3]]


@pytest.mark.usefixtures("needs_library")
def test_ids_beyond_the_tokenizer_are_never_allowed_and_no_end_token_is_needed(tokenizer):
    vocab_size = tokenizer.vocab_size + 41
    for eos in ((EOS,), ()):
        compiled = grammars.Grammars(tokenizer, vocab_size, eos)
        matcher = compiled.compile(form(regex="[a-z]*"))
        bits = np.unpackbits(compiled._library.mask(matcher.deep_copy()).view(np.uint8), bitorder="little")
        assert len(bits) == -(-vocab_size // 32) * 32
        allowed = np.flatnonzero(bits)
        assert (EOS in allowed) is bool(eos)
        assert allowed.max() < tokenizer.vocab_size
        assert all(re.fullmatch("[a-z]+", tokenizer.decode([i])) for i in allowed if i != EOS)


def test_without_the_extra_the_error_names_it(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = make_engine(model, tokenizer)
    with pytest.raises(ValueError, match=r"pip install 'jaxpaged\[structured\]'"):
        engine.add_request([5, 6], SamplingParams(structured_outputs=form(regex="a")))
    assert not engine.has_unfinished


def test_without_a_tokenizer_a_form_is_refused(model):
    with pytest.raises(ValueError, match="structured_outputs need a tokenizer"):
        make_engine(model).add_request([5, 6], SamplingParams(structured_outputs=form(regex="a")))
