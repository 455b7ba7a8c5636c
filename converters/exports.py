"""The tables of weights backwards: which parameters make up each tensor of a Hugging Face checkpoint."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from converters.rules import Ignore, Row, Rule, Split, Stack, expected_shape, join, make_plan, match, named, targets_of


@dataclass(frozen=True)
class Export:
    """One tensor to write, and the parameters it is made of."""

    name: str
    shape: tuple[int, ...]
    row: Rule | Split | Stack
    parameters: tuple[str, ...]
    entry: int | None = None
    """Which entry of a stacked parameter; None is all of it."""

    def build(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the tensor; `read(path)` gives a parameter."""
        if isinstance(self.row, Split):
            return join(self.row, [read(path) for path in self.parameters])
        parameter = read(self.parameters[0])
        return self.row.transform.inverse(parameter if self.entry is None else parameter[self.entry])


def make_exports(
    rows: Iterable[Row], parameters: Mapping[str, tuple[int, ...]], where: str
) -> tuple[Export, ...]:
    """Return the tensors that hold these parameters, each parameter once, in the order of the parameters.

    Where several rows fill a parameter the first one names it. ValueError, naming `where` and the parameters, if one
    has no row, or if what is written would not be read as the same parameters.
    """
    rows = tuple(rows)
    exports: dict[str, Export] = {}
    done: set[str] = set()
    for path in parameters:
        if path in done:
            continue
        made = _exports_of(rows, path, parameters, where)
        exports |= {export.name: export for export in made}
        done.update(name for export in made for name in export.parameters)
    # what no reader would take is never written
    make_plan(rows, {export.name: export.shape for export in exports.values()}, parameters, where)
    return tuple(exports.values())


def _exports_of(
    rows: Iterable[Row], path: str, parameters: Mapping[str, tuple[int, ...]], where: str
) -> list[Export]:
    """Return the tensors of the first row that fills the parameter."""
    for row in rows:
        for pattern in targets_of(row):
            numbers = match(pattern, path)
            if numbers is None or isinstance(row, Ignore):
                continue
            paths = tuple(named(target, numbers) for target in targets_of(row))
            if missing := [name for name in paths if name not in parameters]:
                raise ValueError(f"{where}: parameter {path!r} is written together with {missing}, which are not there")
            shape = expected_shape(row, [parameters[name] for name in paths])
            assert shape is not None
            if not isinstance(row, Stack):
                return [Export(named(row.source, numbers), shape, row, paths)]
            return [
                Export(named(row.source, numbers | {"e": entry}), shape, row, paths, entry)
                for entry in range(parameters[path][0])
            ]
    raise ValueError(f"{where}: parameter {path!r} has no tensor in the checkpoints of this architecture")
