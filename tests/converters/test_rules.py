"""The law of the tables: each source tensor used once or ignored with a reason, each parameter filled once."""

import numpy as np
import pytest

from converters.rules import KEEP, TRANSPOSE, Ignore, Rule, make_plan

RULES = (
    Rule("embed", "table"),
    Rule("h.{i}.w", "layers.{i}.kernel", TRANSPOSE),
    Ignore("h.{i}.inv_freq", because="recomputed"),
)
TARGETS = {"table": (5, 2), "layers.0.kernel": (2, 3), "layers.1.kernel": (2, 3)}
SOURCES = {"h.1.w": (3, 2), "h.0.w": (3, 2), "h.0.inv_freq": (1,), "embed": (5, 2)}


def test_every_tensor_has_one_place():
    plan = make_plan(RULES, SOURCES, TARGETS, "here")
    assert [(a.source, a.target, a.transform.name) for a in plan.assignments] == [
        ("embed", "table", "kept"),
        ("h.0.w", "layers.0.kernel", "transposed"),
        ("h.1.w", "layers.1.kernel", "transposed"),
    ]
    assert [(name, rule.because) for name, rule in plan.ignored] == [("h.0.inv_freq", "recomputed")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed": None}, "here: missing tensors: embed"),
        ({"h.1.w": None}, "here: missing tensors: h.1.w"),
        ({"h.2.w": (3, 2)}, "here: tensors this architecture does not have: h.2.w"),
        ({"h.01.w": (3, 2)}, "does not have: h.01.w"),
        ({"surprise": (1,)}, "does not have: surprise"),
        ({"h.0.w": (2, 3)}, r"'h.0.w' has shape \[2, 3\]: config.json says \[3, 2\]"),
    ],
)
def test_a_tensor_too_many_too_few_or_misshapen_is_named(changes, said):
    sources = {name: shape for name, shape in (SOURCES | changes).items() if shape is not None}
    with pytest.raises(ValueError, match=said):
        make_plan(RULES, sources, TARGETS, "here")


def test_a_tensor_claimed_twice_and_a_parameter_filled_twice_are_refused():
    with pytest.raises(ValueError, match="'embed' is claimed by 2 rules"):
        make_plan((*RULES, Ignore("embed", because="no")), SOURCES, TARGETS, "here")
    with pytest.raises(ValueError, match="'embed' and 'wte' would both fill 'table'"):
        make_plan((*RULES, Rule("wte", "table")), SOURCES | {"wte": (5, 2)}, TARGETS, "here")


def test_a_transform_says_the_shape_it_needs():
    tensor = np.arange(6).reshape(2, 3)
    for transform in (KEEP, TRANSPOSE):
        assert transform.source_shape(transform.apply(tensor).shape) == tensor.shape
    assert TRANSPOSE.apply(tensor).flags.c_contiguous
