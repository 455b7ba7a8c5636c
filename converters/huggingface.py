"""Hugging Face folders: read lazily, checked before anything is loaded, and converted in memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from converters.architectures import ARCHITECTURES, NAME_OF_MODEL_TYPE
from converters.conversion import Conversion
from converters.rules import KEEP, Assignment, Ignore, Part, Plan, Row, make_plan
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import fill, is_used_in_place, parameter_specs, place
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import TensorFolder, read_json


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checked Hugging Face folder: everything is known but the data."""

    config: ModelConfig
    model: Decoder
    """With shapes in place of weights."""
    plan: Plan
    tensors: TensorFolder

    def read(self, assignment: Assignment) -> np.ndarray:
        """Return the parameter's data as the model wants it."""

        def read(source: str, part: Part | None) -> np.ndarray:
            if part is None:
                return self.tensors.read(source)
            return self.tensors.read_ranges(source, part.axis, part.ranges)

        return assignment.read(read, checkpoint.NUMPY_DTYPES[self.config.dtype])


@contextmanager
def open_checkpoint(
    source: Path, dtype: str | None, *, max_model_len: int | None = None
) -> Iterator[OpenCheckpoint]:
    """Check the folder down to the last tensor's shape, and give it open for reading.

    ValueError, naming the file and the tensor or attribute, for whatever is not as it should be.
    """
    checkpoint.check_dtype(dtype)
    if not source.is_dir():
        raise ValueError(f"{source}: not a folder: give the folder of a Hugging Face model (nothing is downloaded)")
    values = read_json(source / "config.json")
    if values.get("format") == checkpoint.FORMAT:
        raise ValueError(f"{source}: is a native checkpoint already: load it as it is")
    checkpoint.refuse_remote_code(source)
    with TensorFolder(source) as tensors:
        name = _architecture_name(source, values)
        first = next(iter(tensors.specs.values()), None)
        try:
            config = ARCHITECTURES[name].translate(
                values, dtype=dtype, default_dtype="float32" if first is None else first.dtype.name
            )
        except ValueError as error:
            raise ValueError(f"{source / 'config.json'}: {error}") from error
        checkpoint.read_generation_defaults(source)  # a bad one is refused here, not by the one who loads the copy
        config = checkpoint.with_stop_tokens(source, config)
        model = build_abstract(config, max_model_len=max_model_len)
        plan = make_plan(
            _rows(ARCHITECTURES[name], config, tensors),
            {tensor: spec.shape for tensor, spec in tensors.specs.items()},
            {path: tuple(spec.shape) for path, spec in parameter_specs(model).items()},
            str(source),
            {tensor: spec.file for tensor, spec in tensors.specs.items()},
        )
        _check_ignored(source, plan, tensors)
        yield OpenCheckpoint(config, model, plan, tensors)


def _rows(conversion: Conversion, config: ModelConfig, tensors: TensorFolder) -> tuple[Row, ...]:
    """Return the table of weights, by the names of a checkpoint that may lack the prefix."""
    rows, prefix = conversion.rules(config), conversion.optional_prefix
    if not prefix or any(name.startswith(prefix) for name in tensors.specs):
        return rows
    return tuple(
        replace(row, source=row.source.removeprefix(prefix), same_as=(row.same_as or "").removeprefix(prefix) or None)
        if isinstance(row, Ignore)
        else replace(row, source=row.source.removeprefix(prefix))
        for row in rows
    )


def _architecture_name(source: Path, values: Mapping[str, Any]) -> str:
    names = values.get("architectures")
    model_type = values.get("model_type")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if names is None and isinstance(model_type, str):
        name = NAME_OF_MODEL_TYPE.get(model_type)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{source / 'config.json'}: architectures={names!r}, model_type={model_type!r}: no converter; there is one "
            f"for {sorted(ARCHITECTURES)}"
        )
    is_known = isinstance(model_type, str) and NAME_OF_MODEL_TYPE.get(model_type) == name
    if model_type is not None and not is_known:
        raise ValueError(f"{source / 'config.json'}: model_type={model_type!r} does not go with {names!r}")
    return name


def _check_ignored(source: Path, plan: Plan, tensors: TensorFolder) -> None:
    """Raise ValueError if a tensor that may only be ignored as a copy of another is not one."""
    for name, rule in plan.ignored:
        if rule.same_as is None:
            continue
        if not tensors.has_same_data(name, rule.same_as):
            raise ValueError(
                f"{source}: tensor {name!r} is not {rule.because}: it differs from {rule.same_as!r}; set "
                f"tie_word_embeddings to false in config.json if it is meant to be used"
            )


def load_huggingface(
    source: Path | str,
    dtype: str | None = None,
    show_progress: bool = False,
    *,
    max_model_len: int | None = None,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
) -> tuple[ModelConfig, Decoder]:
    """Return the facts and the filled model of a Hugging Face folder, converted in memory, one tensor at a time.

    `dtype` None keeps the checkpoint's own (float16 is widened to float32). `put(path, array)` places each parameter
    (default: on the default device). Whatever is wrong raises ValueError before any weight is read.
    """
    with open_checkpoint(Path(source), dtype, max_model_len=max_model_len) as opened:
        parameters = _parameters(opened, put is None, show_progress=show_progress)
        return opened.config, fill(opened.model, parameters, put=put or place)


def _parameters(
    opened: OpenCheckpoint, is_placed_here: bool, *, show_progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    assignments = opened.plan.assignments
    wanted = checkpoint.NUMPY_DTYPES[opened.config.dtype]
    in_order = [name for assignment in assignments if assignment.part is None for name in assignment.sources]
    opened.tensors.expect(
        in_order,
        are_kept=is_placed_here and is_used_in_place()
        and all(one.transform is KEEP and not one.is_stacked for one in assignments)
        and all(spec.dtype == wanted for spec in opened.tensors.specs.values()),
    )
    for assignment in tqdm(assignments, unit="tensor", desc="weights", disable=not show_progress):
        yield assignment.target, opened.read(assignment)
