"""Requests drawn from our OpenAPI document, and from its opposite: no 500, and no answer that it does not foresee."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jaxpaged.server.openapi import BODIES, make_document

# schemathesis' strategies use the global generator here and there, and other threads may; both stand in hypothesis' way
pytestmark = pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module inside strategies:hypothesis.errors.HypothesisDeprecationWarning"
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GETS = sorted(set(make_document()["paths"]) - set(BODIES))


@pytest.fixture(scope="module")
def schema():
    return schemathesis.openapi.from_dict(make_document())


def fuzz(server, operation, mode, num_examples, limits):
    """Draw requests for one operation, check each answer against the document, and count the statuses.

    Args:
        limits: What a body gets where it says nothing, so that few tokens are generated.
    """
    counts: Counter[int] = Counter()

    @settings(
        max_examples=num_examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        if isinstance(case.body, dict):
            for name, value in limits.items():
                case.body.setdefault(name, value)
        response = case.call(base_url=server.url)
        case.validate_response(response, checks=CHECKS)
        counts[response.status_code] += 1

    send()
    return counts


def fuzz_all(server, schema, num_examples):
    """Every operation; the statuses of those with bodies, by path and mode."""
    counts = {}
    for path in BODIES:
        operation = schema[path]["POST"]
        has_tokens = "max_tokens" in BODIES[path][0].model_fields
        for mode in GenerationMode:
            limits = {"max_tokens": 2} if has_tokens and mode is GenerationMode.POSITIVE else {}
            counts[path, mode] = fuzz(server, operation, mode, num_examples, limits)
    for path in GETS:
        fuzz(server, schema[path]["GET"], GenerationMode.POSITIVE, 5, {})
    return counts


def test_no_drawn_request_gets_what_the_document_does_not_foresee(server, schema):
    counts = fuzz_all(server, schema, 60)
    assert sum(counts["/v1/completions", GenerationMode.NEGATIVE].values()) > 20
    for path in BODIES:
        assert counts[path, GenerationMode.NEGATIVE][400] > counts[path, GenerationMode.NEGATIVE][200], counts
    # what is drawn depends on what else was imported, and fields that each may stand often exclude each other
    assert sum(counts[path, GenerationMode.POSITIVE][200] for path in BODIES) > 0, counts


@pytest.mark.slow
def test_no_drawn_request_of_thousands_gets_what_the_document_does_not_foresee(server, schema):
    counts = fuzz_all(server, schema, 1500)
    assert all(counts[path, GenerationMode.POSITIVE][200] > 0 for path in BODIES), counts


def test_the_document_is_served_and_names_every_route(server):
    document = server.http.get("/openapi.json").json()
    assert document == make_document()
    for path, methods in document["paths"].items():
        for method in methods:
            answer = server.http.request(method, path.format(model="demo"))
            assert answer.status_code in (200, 415), path  # a body is asked for, and none was sent
