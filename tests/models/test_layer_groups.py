"""Groups of layers, by the memory of a long sequence: figures worked by hand."""

import jax

from jaxpaged.models.layer_groups import GroupedMetadata, LayerGroups, group_layers, place_of

COLUMNS = {None: 100, 9: 10, 50: 60}


def groups(*windows):
    return group_layers(windows, COLUMNS.__getitem__)


def test_layers_that_are_alike_are_one_group():
    assert groups(None, None, None) == LayerGroups((None,), 3)
    assert groups(9, 9) == LayerGroups((9,), 2)


def test_every_other_layer():
    # 4 * 100 blocks of a layer in one group; 2 * (10 + 100) in two of two layers
    assert groups(9, None, 9, None) == LayerGroups((9, None), 2, ((0, 0), (1, 0), (0, 1), (1, 1)))


def test_a_kind_with_more_layers_has_several_groups_and_the_last_may_lack_some():
    # two layers without a window, five with: groups of 5 take (10 + 100) * 5 = 550, of 3 (2 * 10 + 100) * 3 = 360, of 2
    # (3 * 10 + 100) * 2 = 260; single layers 250, which is no 5 % less
    found = groups(9, 9, None, 9, 9, None, 9)
    assert (found.windows, found.size) == ((9, 9, 9, None), 2)
    assert found.places == ((0, 0), (0, 1), (3, 0), (1, 0), (1, 1), (3, 1), (2, 0))
    assert len(set(found.places)) == 7


def test_groups_that_save_little_are_not_made():
    # 21 * 100 in one group; single layers would take 2010, and are 21 groups
    assert groups(*[None] * 20, 9) == LayerGroups((None,), 21)


def test_layers_of_three_kinds():
    # one group 300, three of one layer 170
    assert groups(None, 9, 50) == LayerGroups((None, 9, 50), 1, ((0, 0), (1, 0), (2, 0)))


def test_a_layer_finds_its_slot_and_its_metadata():
    metadata = GroupedMetadata(("a", "b"), ((0, 0), (1, 0), (0, 1)))
    assert [place_of(metadata, layer) for layer in range(3)] == [(0, "a"), (0, "b"), (1, "a")]
    assert place_of(GroupedMetadata(("a",)), 5) == (5, "a")
    assert place_of("what is not grouped", 5) == (5, "what is not grouped")
    assert jax.tree.leaves(metadata) == ["a", "b"]
