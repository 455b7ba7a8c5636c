"""Which layers share a block of the cache: groups of one size, so that any block of the pool can be any group's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

MOST_GROUPS = 8
"""A sequence has a table entry for every group and block of tokens, which the host writes and each step reads."""
LEAST_SAVING = 0.05
"""Part of a long sequence's memory that more groups must save to be worth their table entries."""


@dataclass(frozen=True)
class LayerGroups:
    """Layers by groups of equal size. Cache slot j holds layer j of every group, each in blocks of its own."""

    windows: tuple[int | None, ...]
    """Of each group: the tokens whose keys and values its layers need, None for all."""
    size: int
    """Layers of a group, and cache slots; the last group of a kind may be short of some."""
    places: tuple[tuple[int, int], ...] = ()
    """(group, slot) of each layer; empty where there is one group, of all layers in their order."""


def group_layers(windows: Sequence[int | None], most_columns: Callable[[int | None], int]) -> LayerGroups:
    """The groups that take the least memory for a long sequence, and of those that take about as little the fewest.

    Args:
        windows: Of each layer.
        most_columns: Blocks that a long sequence holds of a group with this window.
    """
    layers_of: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        layers_of.setdefault(window, []).append(layer)
    widest = None if None in layers_of else max(window for window in layers_of if window is not None)
    best = LayerGroups((widest,), len(windows))
    if len(layers_of) == 1:
        return best
    least = len(windows) * most_columns(widest)
    # ever more and smaller groups: less memory lies idle in groups that are not full
    for size in range(max(map(len, layers_of.values())), 0, -1):
        counts = {window: -(-len(layers) // size) for window, layers in layers_of.items()}
        cost = size * sum(count * most_columns(window) for window, count in counts.items())
        if sum(counts.values()) <= MOST_GROUPS and cost <= (1 - LEAST_SAVING) * least:
            least, best = cost, _groups_of(layers_of, size)
    return best


def _groups_of(layers_of: dict[int | None, list[int]], size: int) -> LayerGroups:
    windows: list[int | None] = []
    places: dict[int, tuple[int, int]] = {}
    for window, layers in layers_of.items():
        for position, layer in enumerate(layers):
            places[layer] = (len(windows) + position // size, position % size)
        windows += [window] * -(-len(layers) // size)
    return LayerGroups(tuple(windows), size, tuple(places[layer] for layer in sorted(places)))


@partial(jax.tree_util.register_dataclass, data_fields=("groups",), meta_fields=("places",))
@dataclass(frozen=True)
class GroupedMetadata:
    """What attention reads in a step, by layer group: the groups differ in block tables and slots alone."""

    groups: tuple[Any, ...]
    places: tuple[tuple[int, int], ...] = ()
    """As in `LayerGroups`."""


def place_of(metadata: Any, layer: int) -> tuple[int, Any]:
    """The cache slot of a layer, and what its attention reads; metadata that is not grouped is that of every layer."""
    if not isinstance(metadata, GroupedMetadata):
        return layer, metadata
    group, slot = metadata.places[layer] if metadata.places else (0, layer)
    return slot, metadata.groups[group]
