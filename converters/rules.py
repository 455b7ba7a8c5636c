"""Names of weights as data: which source tensor becomes which parameters, and how, in both directions.

A table holds four kinds of rows: `Rule` (one tensor, one parameter), `Split` (one fused tensor, several parameters),
`Stack` (many tensors, one parameter), `Ignore`. Every change can be undone, so the same table leads back: a source
tensor is `transform.inverse` of its parameter, `join` of its parts, or one entry of its stack.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxpaged.models.data_file import aligned_copy, aligned_empty, cast
from jaxpaged.models.parameters import shown_names


@dataclass(frozen=True)
class Transform:
    """What is done to a tensor on its way, and back; it must not change the number of elements."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    """Source tensor -> parameter."""
    inverse: Callable[[np.ndarray], np.ndarray]
    """Parameter -> source tensor, bit for bit."""
    source_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """The shape the source must have, given the shape of the parameter."""


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return aligned_copy(tensor.T, tensor.dtype)


KEEP = Transform("kept", lambda tensor: tensor, lambda tensor: tensor, lambda shape: shape)
TRANSPOSE = Transform("transposed", _transposed, _transposed, lambda shape: shape[::-1])
"""Linear weights are [out, in] in torch and here; a few architectures keep theirs as [in, out]."""


@dataclass(frozen=True)
class Rule:
    """Source tensors named `source` become the parameters named `target`; `{i}` stands for one number in both.

    Where two rows have one target, checkpoints use either name; the first is the one to write.
    """

    source: str
    target: str
    transform: Transform = KEEP


@dataclass(frozen=True)
class Split:
    """A fused source tensor becomes several parameters, which lie side by side along one of its axes.

    With `num_groups` above 1 they alternate: so many times in turn, an equal share of each (query, key and value head
    by head, for example).
    """

    source: str
    targets: tuple[str, ...]
    """In the order in which they lie in the source; the length of each follows from its parameter's shape."""
    transform: Transform = KEEP
    """Of each part, once it is cut out."""
    axis: int = 0
    """Of the source."""
    num_groups: int = 1


@dataclass(frozen=True)
class Stack:
    """Source tensors named `source`, numbered from 0 by `{e}`, become one parameter with `{e}` as its first axis."""

    source: str
    target: str
    transform: Transform = KEEP
    """Of each tensor, before it is stacked."""


@dataclass(frozen=True)
class Ignore:
    """Source tensors named `source` are left out, for a reason; they need not be there.

    With `same_as`, only if they equal that source tensor, bit for bit.
    """

    source: str
    because: str
    same_as: str | None = None


Row = Rule | Split | Stack | Ignore


@dataclass(frozen=True)
class Part:
    """Some ranges of a tensor along one axis."""

    axis: int
    ranges: tuple[tuple[int, int], ...]
    """(start, stop) of each, in order."""


@dataclass(frozen=True)
class Assignment:
    """One parameter and what it is filled from."""

    target: str
    sources: tuple[str, ...]
    """One tensor, or, if `is_stacked`, one for each entry of the parameter's first axis."""
    transform: Transform
    part: Part | None = None
    """What is taken of the tensor; None is all of it."""
    is_stacked: bool = False

    def read(self, read: Callable[[str, Part | None], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Return the parameter in `dtype`; `read(source, part)` gives a tensor, or a part of it.

        One of them is held at a time, beside the parameter where that is stacked.
        """

        def one(source: str) -> np.ndarray:
            return self.transform.apply(cast(read(source, self.part), dtype))

        first = one(self.sources[0])
        if not self.is_stacked:
            return first
        stacked = aligned_empty((len(self.sources), *first.shape), dtype)
        stacked[0] = first
        for index, source in enumerate(self.sources[1:], 1):
            stacked[index] = one(source)
        return stacked


@dataclass(frozen=True)
class Plan:
    """Every source tensor exactly once: assigned (all its parts) or ignored. Every parameter exactly once."""

    assignments: tuple[Assignment, ...]
    ignored: tuple[tuple[str, Ignore], ...]


def parts_of(split: Split, shapes: Sequence[tuple[int, ...]]) -> tuple[Part, ...]:
    """Return where each part lies in the source of a Split, given the shapes of its parameters."""
    lengths = [split.transform.source_shape(shape)[split.axis] // split.num_groups for shape in shapes]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return tuple(
        Part(
            split.axis,
            tuple(
                (group * sum(lengths) + start, group * sum(lengths) + start + length)
                for group in range(split.num_groups)
            ),
        )
        for start, length in zip(starts, lengths, strict=True)
    )


def join(split: Split, parameters: Sequence[np.ndarray]) -> np.ndarray:
    """Return the source tensor that a Split would cut into these parameters: the way back."""
    pieces = [split.transform.inverse(parameter) for parameter in parameters]
    shares = [np.split(piece, split.num_groups, axis=split.axis) for piece in pieces]
    in_turn = [share[group] for group in range(split.num_groups) for share in shares]
    return np.concatenate(in_turn, axis=split.axis)


def targets_of(row: Row) -> tuple[str, ...]:
    """Return the patterns of the parameters that a row fills."""
    if isinstance(row, Ignore):
        return ()
    return row.targets if isinstance(row, Split) else (row.target,)


def match(pattern: str, name: str) -> dict[str, str] | None:
    """Return the numbers that stand for `{i}` and `{e}` in `name`, or None if `name` is not of this pattern."""
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


@functools.lru_cache(maxsize=1024)
def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    for letter in "ie":
        escaped = escaped.replace(re.escape(f"{{{letter}}}"), f"(?P<{letter}>0|[1-9][0-9]{{0,8}})", 1)
    return re.compile(escaped)


def named(pattern: str, numbers: Mapping[str, Any]) -> str:
    """Return the pattern with its numbers put in."""
    for letter, number in numbers.items():
        pattern = pattern.replace(f"{{{letter}}}", str(number))
    return pattern


def make_plan(
    rows: Iterable[Row],
    sources: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, tuple[int, ...]],
    where: str,
    files: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Return what becomes what, given the shapes of the source tensors and of the parameters.

    `files` are those that the source tensors are in, to name them by. ValueError, naming `where` and the tensors, if a
    source tensor is claimed by no row or by two, if a parameter is filled twice or not at all, or if a shape is not
    what its parameters need. No data is read.
    """
    rows = tuple(rows)
    claimed: dict[str, tuple[Row, dict[str, str]]] = {}
    for name in sources:
        matches = [(row, numbers) for row in rows if (numbers := match(row.source, name)) is not None]
        if len(matches) > 1:
            raise ValueError(f"{where}: tensor {name!r} is claimed by {len(matches)} rules")
        if matches:
            claimed[name] = matches[0]
    assigned, extra = _assign(claimed, targets, where)
    extra += [name for name in sources if name not in claimed]
    if missing := _missing(rows, assigned, targets):
        raise ValueError(
            f"{where}: missing tensors: {shown_names(missing)}: the checkpoint is incomplete, or its config.json is "
            "another model's"
        )
    if extra:
        raise ValueError(
            f"{_place(where, files, extra)}: tensors this architecture does not have: {shown_names(extra)}: "
            "config.json is another model's, or the model has added parts that no port here knows"
        )
    for name, (row, numbers) in claimed.items():
        expected = expected_shape(row, [targets[named(target, numbers)] for target in targets_of(row)])
        if expected is not None and sources[name] != expected:
            raise ValueError(
                f"{_place(where, files, [name])}: tensor {name!r} has shape {list(sources[name])}: config.json says "
                f"{list(expected)}"
            )
    ignored = tuple((name, row) for name, (row, _) in claimed.items() if isinstance(row, Ignore))
    return Plan(tuple(_assignment(assigned[name], targets, name) for name in targets), ignored)


def _place(where: str, files: Mapping[str, str], names: Sequence[str]) -> str:
    """Return the file of the tensors, if all are in one; else where all files are."""
    found = {files.get(name) for name in names}
    file = found.pop()
    return where if found or file is None else f"{where}/{file}"


Filling = tuple[Row, dict[str, str], list[str]]
"""A row, the numbers in its names, and the source tensors by which it fills a parameter."""


def _assign(
    claimed: Mapping[str, tuple[Row, dict[str, str]]], targets: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, Filling], list[str]]:
    """Return what fills each parameter, and the source tensors whose parameters the model does not have."""
    assigned: dict[str, Filling] = {}
    extra = []
    for name, (row, numbers) in claimed.items():
        for pattern in targets_of(row):
            target = named(pattern, numbers)
            is_stack = isinstance(row, Stack)
            if target not in targets or (is_stack and int(numbers["e"]) >= targets[target][0]):
                extra.append(name)
                break
            if target not in assigned:
                assigned[target] = (row, numbers, [name])
            elif is_stack and assigned[target][0] is row:
                assigned[target][2].append(name)
            else:
                raise ValueError(f"{where}: {assigned[target][2][0]!r} and {name!r} would both fill {target!r}")
    return assigned, extra


def _missing(
    rows: Sequence[Row], assigned: Mapping[str, Filling], targets: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return the names of the source tensors that parameters still need."""
    missing: dict[str, None] = {}
    for target, shape in targets.items():
        found = assigned.get(target)
        if found is None:
            missing |= dict.fromkeys(source_names(rows, target, shape) or [f"(no rule for {target})"])
        elif isinstance(found[0], Stack) and len(found[2]) < shape[0]:
            missing |= dict.fromkeys(set(source_names(rows, target, shape)) - set(found[2]))
    return list(missing)


def source_names(rows: Iterable[Row], target: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names under which a checkpoint holds the parameter: those of the first row that fills it."""
    for row in rows:
        for pattern in targets_of(row):
            if (numbers := match(pattern, target)) is not None:
                if isinstance(row, Stack):
                    return [named(row.source, numbers | {"e": entry}) for entry in range(shape[0])]
                return [named(row.source, numbers)]
    return []


def expected_shape(row: Row, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that a source tensor of this row has, given those of its parameters; None for any."""
    if isinstance(row, Ignore):
        return None
    if isinstance(row, Stack):
        return row.transform.source_shape(shapes[0][1:])
    if isinstance(row, Rule):
        return row.transform.source_shape(shapes[0])
    expected = list(row.transform.source_shape(shapes[0]))
    expected[row.axis] = sum(row.transform.source_shape(shape)[row.axis] for shape in shapes)
    return tuple(expected)


def _assignment(filling: Filling, targets: Mapping[str, tuple[int, ...]], target: str) -> Assignment:
    row, numbers, names = filling
    assert not isinstance(row, Ignore)
    if isinstance(row, Rule):
        return Assignment(target, (names[0],), row.transform)
    if isinstance(row, Split):
        filled = [named(pattern, numbers) for pattern in row.targets]
        part = parts_of(row, [targets[name] for name in filled])[filled.index(target)]
        return Assignment(target, (names[0],), row.transform, part=part)
    ordered = tuple(named(row.source, numbers | {"e": entry}) for entry in range(targets[target][0]))
    return Assignment(target, ordered, row.transform, is_stacked=True)
