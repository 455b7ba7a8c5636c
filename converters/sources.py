"""What can be converted: a checked checkpoint of any format, or a model in memory, parameter by parameter."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import converters.orbax as orbax
from converters.huggingface import OpenCheckpoint, open_checkpoint
from converters.rules import KEEP, TRANSPOSE, Assignment
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.data_file import cast
from jaxpaged.models.parameters import check_names, parameter_specs
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import read_json

NATIVE, HUGGINGFACE, ORBAX = "native", "huggingface", "orbax"
FORMATS = (NATIVE, HUGGINGFACE, ORBAX)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything is known but the data, and checked: each parameter is there once, in its shape."""

    folder: Path | None
    """None for a model in memory."""
    format: str
    config: ModelConfig
    read: Callable[[str], np.ndarray]
    """The data of a parameter, by path, in the config's dtype."""
    view: Callable[[str], np.ndarray | jax.Array | None]
    """The same without memory of its own, or None where there is no such view."""
    num_tensors: int
    changes: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[tuple[str, str], ...] = ()
    companions: Mapping[str, Path] = field(default_factory=dict)


def format_of(folder: Path) -> str:
    """Return which of FORMATS the folder holds; ValueError, naming it, for none of them."""
    path = folder / checkpoint.CONFIG_FILE
    if not path.is_file() and orbax.looks_like_orbax(folder):
        raise ValueError(
            f"{folder}: an Orbax checkpoint, but no {checkpoint.CONFIG_FILE} beside it says what model it is: write it "
            f"with converters.from_state, which makes a folder with both, the checkpoint as its {orbax.SUBFOLDER}/"
        )
    name = read_json(path).get("format")
    known = {checkpoint.FORMAT: NATIVE, orbax.FORMAT: ORBAX, None: HUGGINGFACE}
    if not isinstance(name, (str, type(None))) or name not in known:
        raise ValueError(f"{path}: format={name!r} is not known: it must be one of {[one for one in known if one]}")
    return known[name]


@contextmanager
def open_source(folder: Path, dtype: str | None) -> Iterator[Source]:
    """Check the folder down to the last tensor's shape, whatever its format, and give it open for reading."""
    checkpoint.check_dtype(dtype)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder: give the folder of a model (nothing is downloaded)")
    kind = format_of(folder)
    if kind == HUGGINGFACE:
        with open_checkpoint(folder, dtype) as opened:
            yield _of_huggingface(folder, opened)
    elif kind == NATIVE:
        with _native(folder, dtype) as source:
            yield source
    else:
        with orbax.open_folder(folder, dtype) as stored:
            yield Source(
                folder=folder, format=ORBAX, config=stored.config, read=stored.read, view=lambda path: None,
                num_tensors=len(parameter_specs(stored.model)), changes={"cast": stored.num_cast},
                companions=checkpoint.companions_of(folder),
            )  # fmt: skip


@contextmanager
def _native(folder: Path, dtype: str | None) -> Iterator[Source]:
    config = checkpoint.read_config(folder)
    checkpoint.read_generation_defaults(folder)
    if dtype is not None:
        config = checkpoint.config_with_dtype(config, dtype)
    wanted = checkpoint.NUMPY_DTYPES[config.dtype]
    with checkpoint.open_weights(folder, build_abstract(config)) as tensors:
        yield Source(
            folder=folder, format=NATIVE, config=config,
            read=lambda path: cast(tensors.read(path), wanted),
            view=lambda path: tensors.mapped(path) if tensors.specs[path].dtype == wanted else None,
            num_tensors=len(tensors.specs),
            changes={"cast": sum(spec.dtype != wanted for spec in tensors.specs.values())},
            companions=checkpoint.companions_of(folder),
        )  # fmt: skip


def _of_huggingface(folder: Path, opened: OpenCheckpoint) -> Source:
    assignments = {assignment.target: assignment for assignment in opened.plan.assignments}
    specs = opened.tensors.specs
    wanted = checkpoint.NUMPY_DTYPES[opened.config.dtype]

    def view(path: str) -> np.ndarray | None:
        one = assignments[path]
        is_as_it_was = one.part is None and not one.is_stacked and one.transform is KEEP
        if not is_as_it_was or specs[one.sources[0]].dtype != wanted:
            return None
        return opened.tensors.mapped(one.sources[0])

    def count(holds: Callable[[Assignment], bool]) -> int:
        return len({name for one in assignments.values() if holds(one) for name in one.sources})

    return Source(
        folder=folder, format=HUGGINGFACE, config=opened.config,
        read=lambda path: opened.read(assignments[path]),
        view=view,
        num_tensors=len(specs),
        changes={
            "renamed": count(lambda one: one.sources[0] != one.target),
            "transposed": count(lambda one: one.transform is TRANSPOSE),
            "split": count(lambda one: one.part is not None),
            "stacked": count(lambda one: one.is_stacked),
            "cast": count(lambda one: any(specs[name].dtype != wanted for name in one.sources)),
        },
        ignored=tuple((name, rule.because) for name, rule in opened.plan.ignored),
        companions=checkpoint.companions_of(folder),
    )  # fmt: skip


def state_arrays(state: Any) -> dict[str, jax.Array | np.ndarray]:
    """Return the arrays of a Flax module, of its `nnx.state`, or of nested dictionaries, by path."""
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    if isinstance(state, nnx.State):
        state = nnx.to_pure_dict(state)
    if not isinstance(state, Mapping):
        raise ValueError(f"state of type {type(state).__name__} is not understood: give nnx.state(model)")
    found: dict[str, Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                visit(child, (*path, str(name)))
        elif isinstance(node, (jax.Array, np.ndarray)):
            found[".".join(path)] = node
        else:
            raise ValueError(f"state: {'.'.join(path)!r} is a {type(node).__name__}: only arrays can be parameters")

    visit(state, ())
    return found


def of_state(state: Any, config: ModelConfig, companions: Iterable[Path]) -> Source:
    """Return a model in memory as a source; ValueError, by name, unless it has each parameter once, in its shape."""
    arrays = state_arrays(state)
    specs = parameter_specs(build_abstract(config))
    check_names(arrays, specs, "state")
    wanted = checkpoint.NUMPY_DTYPES[config.dtype]
    for name, spec in specs.items():
        if tuple(arrays[name].shape) != tuple(spec.shape):
            raise ValueError(
                f"state: parameter {name!r} has shape {list(arrays[name].shape)}: the config says {list(spec.shape)}"
            )
        if np.dtype(arrays[name].dtype) not in checkpoint.NUMPY_DTYPES.values():
            raise ValueError(
                f"state: parameter {name!r} has element type {arrays[name].dtype}: it must be one of "
                f"{list(checkpoint.NUMPY_DTYPES)}"
            )
    return Source(
        folder=None, format="flax", config=config,
        read=lambda path: cast(np.asarray(arrays[path]), wanted),
        view=lambda path: arrays[path] if arrays[path].dtype == wanted else None,
        num_tensors=len(arrays),
        changes={"cast": sum(array.dtype != wanted for array in arrays.values())},
        companions={path.name: path for path in companions},
    )  # fmt: skip
