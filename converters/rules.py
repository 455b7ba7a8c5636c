"""Names of weights as data: which source tensor becomes which parameter, and how."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxpaged.models.parameters import shown_names


@dataclass(frozen=True)
class Transform:
    """What is done to a tensor on its way; it must not change the number of elements."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    source_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """The shape the source must have, given the shape of the parameter."""


KEEP = Transform("kept", lambda tensor: tensor, lambda shape: shape)
TRANSPOSE = Transform("transposed", lambda tensor: np.ascontiguousarray(tensor.T), lambda shape: shape[::-1])
"""Linear weights are [out, in] in torch and here; a few architectures keep theirs as [in, out]."""


@dataclass(frozen=True)
class Rule:
    """Source tensors named `source` become the parameters named `target`; `{i}` stands for one number in both."""

    source: str
    target: str
    transform: Transform = KEEP


@dataclass(frozen=True)
class Ignore:
    """Source tensors named `source` are left out, for a reason; they need not be there.

    With `same_as`, only if they equal that source tensor, bit for bit.
    """

    source: str
    because: str
    same_as: str | None = None


@dataclass(frozen=True)
class Assignment:
    """One parameter and the tensor it is filled from."""

    source: str
    target: str
    transform: Transform


@dataclass(frozen=True)
class Plan:
    """Every source tensor exactly once: assigned or ignored. Every parameter exactly once."""

    assignments: tuple[Assignment, ...]
    ignored: tuple[tuple[str, Ignore], ...]


def _match(pattern: str, name: str) -> str | None:
    """Return the number that stands for `{i}` in `name` ("" if there is none), or None if `name` does not match."""
    expression = re.escape(pattern).replace(re.escape("{i}"), "(0|[1-9][0-9]{0,8})", 1)
    found = re.fullmatch(expression, name)
    return None if found is None else (found.group(1) if found.groups() else "")


def make_plan(
    rules: Iterable[Rule | Ignore],
    sources: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, tuple[int, ...]],
    where: str,
) -> Plan:
    """Return what becomes what, given the shapes of the source tensors and of the parameters.

    ValueError, naming `where` and the tensors, if a source tensor is claimed by no rule or by two, if a parameter is
    filled twice or not at all, or if a shape is not what its parameter needs. No data is read.
    """
    rules = tuple(rules)
    assigned: dict[str, Assignment] = {}
    ignored: list[tuple[str, Ignore]] = []
    extra = []
    for name in sources:
        matches = [(rule, number) for rule in rules if (number := _match(rule.source, name)) is not None]
        if len(matches) > 1:
            raise ValueError(f"{where}: tensor {name!r} is claimed by {len(matches)} rules")
        if not matches:
            extra.append(name)
            continue
        rule, number = matches[0]
        if isinstance(rule, Ignore):
            ignored.append((name, rule))
            continue
        target = rule.target.replace("{i}", number)
        if target not in targets:
            extra.append(name)
        elif target in assigned:
            raise ValueError(f"{where}: {assigned[target].source!r} and {name!r} would both fill {target!r}")
        else:
            assigned[target] = Assignment(name, target, rule.transform)
    if missing := set(targets) - set(assigned):
        raise ValueError(
            f"{where}: missing tensors: {shown_names(_source_name(rules, name) for name in missing)}: the checkpoint "
            "is incomplete, or its config.json is another model's"
        )
    if extra:
        raise ValueError(
            f"{where}: tensors this architecture does not have: {shown_names(extra)}: config.json is another model's, "
            "or the model has added parts that no port here knows"
        )
    for target, assignment in assigned.items():
        expected = assignment.transform.source_shape(targets[target])
        if sources[assignment.source] != expected:
            raise ValueError(
                f"{where}: tensor {assignment.source!r} has shape {list(sources[assignment.source])}: "
                f"config.json says {list(expected)}"
            )
    return Plan(tuple(assigned[name] for name in targets), tuple(ignored))


def _source_name(rules: Iterable[Rule | Ignore], target: str) -> str:
    """Return the name under which the source should hold the parameter."""
    for rule in rules:
        if isinstance(rule, Rule) and (number := _match(rule.target, target)) is not None:
            return rule.source.replace("{i}", number)
    return f"(no rule for {target})"
