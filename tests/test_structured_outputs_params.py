"""What the door refuses of a form: contradictions, wrong types, and whatever is too large, before anything compiles."""

import dataclasses
import math

import pytest

from jaxpaged.structured_outputs import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_SCHEMA_DEPTH,
    StructuredOutputsParams,
)

CYCLE: dict = {}
CYCLE["a"] = CYCLE
ALIASED: dict = {}
for _ in range(MAX_SCHEMA_DEPTH - 2):  # 2**62 paths through 62 mappings
    ALIASED = {"a": ALIASED, "b": ALIASED}
DEEP: dict = {}
for _ in range(MAX_SCHEMA_DEPTH + 1):
    DEEP = {"not": DEEP}
LONG = "x" * (MAX_GRAMMAR_BYTES + 1)
BAD_TEXTS = [5, b"x", "", [], LONG, "a\ud800", "a\0b"]
BAD = {
    "json": [5, b"{}", [], "", "{", "[1]", "[" * 10**5, '"x"', {"a": math.nan}, {"a": {1}}, {"a": LONG}, LONG, CYCLE,
             ALIASED, DEEP, {"a": "\ud800"}],
    "regex": BAD_TEXTS,
    "grammar": BAD_TEXTS,
    "choice": ["x", 5, [], {"a": 1}, [""], ["a", 5], ["a\0"], ["\ud800"], ["x"] * (MAX_CHOICES + 1), [LONG],
               ["x" * 1000] * 100],
    "json_object": [False, 1, "true", {}],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_form_is_refused_by_name(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name) as refusal:
            StructuredOutputsParams(**{name: value})
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing"),
        ({"json": "{}", "regex": "a"}, "json, regex: give exactly one"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "disable_any_whitespace has no effect on choice"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern has no effect on regex"),
        ({"json": "{}", "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradicts"),
        ({"json": "{}", "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"json": "{}", "whitespace_pattern": ""}, "whitespace_pattern"),
        ({"structural_tag": "x"}, "structural_tag.*is no field.*grammar"),
        ({"json": "{}", "disable_additional_properties": True}, "additionalProperties"),
        ({"json": "{}", "x": 1}, "choose among"),
    ],
)
def test_contradictions_and_unknown_names_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**given)


def test_a_pydantic_model_is_refused_with_the_call_that_gives_its_schema():
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed (extra: server)")
    model = pydantic.create_model("Person", name=(str, ...))
    for value in (model, model(name="x")):
        with pytest.raises(ValueError, match=r"^json=.* give its model_json_schema\(\)$"):
            StructuredOutputsParams(json=value)
    assert "name" in StructuredOutputsParams(json=model.model_json_schema()).json


def test_a_checked_form_is_frozen_checks_again_and_can_be_a_key():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    params = StructuredOutputsParams(json=schema)
    schema["type"] = "array"
    assert params.json == '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    assert dataclasses.replace(params) == params
    assert {params: 1}[StructuredOutputsParams(json=params.json)] == 1
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")
    assert hash(StructuredOutputsParams(json_object=True, disable_any_whitespace=True))
