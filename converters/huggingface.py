"""Hugging Face folders: read lazily, checked before anything is loaded, converted in memory or to a native folder."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from converters.architectures import ARCHITECTURES, NAME_OF_MODEL_TYPE
from converters.conversion import Conversion
from converters.rules import TRANSPOSE, Assignment, Ignore, Part, Plan, Row, make_plan
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import fill, parameter_specs, place
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import TensorFolder, read_json, remove_dead_partials


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did; `str()` of it is a table for people."""

    source: Path
    target: Path
    architecture: str
    dtype: str
    num_source_tensors: int
    num_parameters: int
    num_elements: int
    num_bytes: int
    num_transposed: int
    num_cast: int
    """Tensors whose element type was changed."""
    ignored: tuple[tuple[str, str], ...]
    """Source tensors left out, and why."""
    weight_files: tuple[str, ...]
    copied_files: tuple[str, ...]
    removed_folders: tuple[Path, ...]
    """What conversions to the same target had left that were killed."""
    duration_s: float

    def __str__(self) -> str:
        rows = [
            ("source", str(self.source)),
            ("target", str(self.target)),
            ("architecture", f"{self.architecture}, {self.num_elements:,} parameters in {self.dtype}"),
            ("tensors read", f"{self.num_source_tensors} ({self.num_transposed} transposed, {self.num_cast} cast)"),
            ("tensors written", f"{self.num_parameters}, {self.num_bytes:,} bytes, {len(self.weight_files)} file(s)"),
            *(("ignored", f"{name}: {because}") for name, because in self.ignored[:8]),
            *([("ignored", f"and {len(self.ignored) - 8} more")] if len(self.ignored) > 8 else []),
            ("copied", ", ".join(self.copied_files) or "nothing"),
            *(("removed", f"{path}: left by a conversion that was killed") for path in self.removed_folders),
            ("seconds", f"{self.duration_s:.1f}"),
        ]
        return "\n".join(f"{label:<16} {text}" for label, text in rows)


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
    _refuse_remote_code(source / "config.json")
    _refuse_remote_code(source / "tokenizer_config.json")
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


def _refuse_remote_code(path: Path) -> None:
    if path.is_file() and read_json(path).get("auto_map"):
        raise ValueError(f"{path}: auto_map asks for code of the checkpoint: no remote code is ever run")


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
        return opened.config, fill(opened.model, _parameters(opened, show_progress=show_progress), put=put or place)


def _parameters(opened: OpenCheckpoint, *, show_progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    assignments = opened.plan.assignments
    opened.tensors.expect(
        name for assignment in assignments if assignment.part is None for name in assignment.sources
    )
    for assignment in tqdm(assignments, unit="tensor", desc="weights", disable=not show_progress):
        yield assignment.target, opened.read(assignment)


def _sources(assignments: Iterable[Assignment]) -> set[str]:
    return {name for assignment in assignments for name in assignment.sources}


def convert(
    source: Path | str,
    target: Path | str,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> ConversionReport:
    """Write the Hugging Face folder `source` as a native checkpoint `target`, and return what was done.

    `target` appears complete or not at all; what a killed conversion to it left is removed. Tokenizer files and
    generation_config.json are copied along, code never. Whatever is wrong raises ValueError naming file and tensor.
    """
    started = time.perf_counter()
    for name, path in (("source", source), ("target", target)):
        if not str(path).strip():
            raise ValueError(f"the {name} is empty: give the path of a folder")
    source, target = Path(source), Path(target)
    checkpoint.check_target(target, overwrite=overwrite)
    companions = {name: source / name for name in checkpoint.COMPANION_FILES if (source / name).is_file()}
    with open_checkpoint(source, dtype) as opened:
        assignments = {assignment.target: assignment for assignment in opened.plan.assignments}
        num_bytes = 0
        removed_folders = remove_dead_partials(target.absolute())
        with tqdm(total=len(assignments), unit="tensor", desc="converting", disable=not show_progress) as bar:

            def read(name: str) -> np.ndarray:
                nonlocal num_bytes
                array = opened.read(assignments[name])
                num_bytes += array.nbytes
                bar.update()
                return array

            files = checkpoint.write(
                target,
                opened.config,
                read,
                companions=companions,
                overwrite=overwrite,
                max_shard_bytes=max_shard_bytes,
            )
        specs = opened.tensors.specs
        kept_dtype = checkpoint.NUMPY_DTYPES[opened.config.dtype]
        return ConversionReport(
            source=source,
            target=target,
            architecture=opened.config.architecture,
            dtype=opened.config.dtype,
            num_source_tensors=len(specs),
            num_parameters=len(assignments),
            num_elements=num_bytes // kept_dtype.itemsize,
            num_bytes=num_bytes,
            num_transposed=len(_sources(a for a in assignments.values() if a.transform is TRANSPOSE)),
            num_cast=sum(specs[name].dtype != kept_dtype for name in _sources(assignments.values())),
            ignored=tuple((name, rule.because) for name, rule in opened.plan.ignored),
            weight_files=files,
            copied_files=tuple(companions),
            removed_folders=removed_folders,
            duration_s=time.perf_counter() - started,
        )
