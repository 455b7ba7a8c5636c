"""The law of the tables: each source tensor used once or ignored with a reason, each parameter filled once."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.rules import KEEP, TRANSPOSE, Ignore, Part, Rule, Split, Stack, join, make_plan, parts_of, source_names
from jaxpaged.models.tensor_files import TensorFolder

RULES = (
    Rule("embed", "table"),
    Rule("h.{i}.w", "layers.{i}.kernel", TRANSPOSE),
    Ignore("h.{i}.inv_freq", because="recomputed"),
)
TARGETS = {"table": (5, 2), "layers.0.kernel": (2, 3), "layers.1.kernel": (2, 3)}
SOURCES = {"h.1.w": (3, 2), "h.0.w": (3, 2), "h.0.inv_freq": (1,), "embed": (5, 2)}


def test_every_tensor_has_one_place():
    plan = make_plan(RULES, SOURCES, TARGETS, "here")
    assert [(*a.sources, a.target, a.transform.name) for a in plan.assignments] == [
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
        np.testing.assert_array_equal(transform.inverse(transform.apply(tensor)), tensor)
    assert TRANSPOSE.apply(tensor).flags.c_contiguous


FUSED = (
    Split("h.{i}.qkv", ("layers.{i}.q", "layers.{i}.k", "layers.{i}.v")),
    Split("h.{i}.conv", ("layers.{i}.gate", "layers.{i}.up"), TRANSPOSE, axis=1),
    Split("h.{i}.heads", ("layers.{i}.hq", "layers.{i}.hk"), num_groups=2),
    Stack("h.{i}.experts.{e}.w", "layers.{i}.experts"),
)
FUSED_TARGETS = {
    "layers.0.q": (4, 3), "layers.0.k": (2, 3), "layers.0.v": (2, 3),
    "layers.0.gate": (3, 5), "layers.0.up": (3, 5),
    "layers.0.hq": (4,), "layers.0.hk": (2,),
    "layers.0.experts": (11, 2, 3),
}
FUSED_SOURCES = {
    "h.0.qkv": (8, 3), "h.0.conv": (5, 6), "h.0.heads": (6,),
    **{f"h.0.experts.{e}.w": (2, 3) for e in (10, *range(10))},
}


def read_fused(folder, dtype):
    """The parameters that a file of running numbers gives, and the numbers by source."""
    numbers = np.arange(sum(int(np.prod(shape)) for shape in FUSED_SOURCES.values()), dtype=np.float32)
    tensors, start = {}, 0
    for name, shape in FUSED_SOURCES.items():
        size = int(np.prod(shape))
        tensors[name] = numbers[start : start + size].reshape(shape).astype(ml_dtypes.bfloat16)
        start += size
    save_file(tensors, folder / "model.safetensors")
    plan = make_plan(FUSED, FUSED_SOURCES, FUSED_TARGETS, "here")
    with TensorFolder(folder) as files:

        def read(source, part):
            return files.read(source) if part is None else files.read_ranges(source, part.axis, part.ranges)

        parameters = {a.target: a.read(read, np.dtype(dtype)) for a in plan.assignments}
    return parameters, tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_fused_tensor_is_cut_where_its_parameters_lie(tmp_path, dtype):
    parameters, tensors = read_fused(tmp_path, dtype)
    assert {name: array.shape for name, array in parameters.items()} == FUSED_TARGETS
    assert {array.dtype for array in parameters.values()} == {np.dtype(dtype)}
    qkv, conv = tensors["h.0.qkv"], tensors["h.0.conv"]
    np.testing.assert_array_equal(parameters["layers.0.q"], qkv[:4])
    np.testing.assert_array_equal(parameters["layers.0.k"], qkv[4:6])
    np.testing.assert_array_equal(parameters["layers.0.v"], qkv[6:])
    np.testing.assert_array_equal(parameters["layers.0.gate"], conv[:, :3].T)
    np.testing.assert_array_equal(parameters["layers.0.up"], conv[:, 3:].T)
    # two heads, each of two rows of hq and one of hk: q0 q1 k0 q2 q3 k1
    np.testing.assert_array_equal(parameters["layers.0.hq"], tensors["h.0.heads"][[0, 1, 3, 4]])
    np.testing.assert_array_equal(parameters["layers.0.hk"], tensors["h.0.heads"][[2, 5]])
    for entry in range(11):  # by number, not in the order of the file or of the names
        np.testing.assert_array_equal(parameters["layers.0.experts"][entry], tensors[f"h.0.experts.{entry}.w"])


def test_the_way_back_gives_the_source_bit_for_bit(tmp_path):
    parameters, tensors = read_fused(tmp_path, ml_dtypes.bfloat16)
    for split in FUSED[:3]:
        back = join(split, [parameters[target.replace("{i}", "0")] for target in split.targets])
        np.testing.assert_array_equal(back, tensors[split.source.replace("{i}", "0")])


def test_the_parts_of_a_fused_tensor_cover_it_once():
    assert parts_of(FUSED[2], [(4,), (2,)]) == (Part(0, ((0, 2), (3, 5))), Part(0, ((2, 3), (5, 6))))
    assert source_names(FUSED, "layers.3.k", (2, 3)) == ["h.3.qkv"]
    assert source_names(FUSED, "layers.3.experts", (2, 2, 3)) == ["h.3.experts.0.w", "h.3.experts.1.w"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"h.0.qkv": None}, "here: missing tensors: h.0.qkv: "),
        ({"h.0.experts.7.w": None}, "here: missing tensors: h.0.experts.7.w: "),
        ({"h.0.experts.11.w": (2, 3)}, "does not have: h.0.experts.11.w"),
        ({"h.1.qkv": (8, 3)}, "does not have: h.1.qkv"),
        ({"h.0.qkv": (9, 3)}, r"'h.0.qkv' has shape \[9, 3\]: config.json says \[8, 3\]"),
        ({"h.0.conv": (6, 5)}, r"'h.0.conv' has shape \[6, 5\]: config.json says \[5, 6\]"),
        ({"h.0.heads": (3,)}, r"'h.0.heads' has shape \[3\]: config.json says \[6\]"),
        ({"h.0.experts.3.w": (3, 2)}, r"'h.0.experts.3.w' has shape \[3, 2\]: config.json says \[2, 3\]"),
    ],
)
def test_a_fused_tensor_or_a_stack_that_is_not_whole_is_named(changes, said):
    sources = {name: shape for name, shape in (FUSED_SOURCES | changes).items() if shape is not None}
    with pytest.raises(ValueError, match=said):
        make_plan(FUSED, sources, FUSED_TARGETS, "here")


def test_a_parameter_that_a_fused_tensor_fills_is_not_filled_by_another():
    with pytest.raises(ValueError, match="'h.0.qkv' and 'h.0.k' would both fill 'layers.0.k'"):
        make_plan((*FUSED, Rule("h.{i}.k", "layers.{i}.k")), FUSED_SOURCES | {"h.0.k": (2, 3)}, FUSED_TARGETS, "here")
