"""Conversions between formats: any source to a folder that appears whole or not at all, and any folder to a model."""

import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import converters.orbax as orbax
from converters.architectures import ARCHITECTURES
from converters.exports import Export, make_exports
from converters.huggingface import load_huggingface, open_checkpoint
from converters.report import ConversionReport
from converters.rules import TRANSPOSE, Split
from converters.sources import FORMATS, HUGGINGFACE, NATIVE, ORBAX, Source, format_of, of_state, open_source
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.new_folder import new_folder, remove_dead_partials, remove_folder
from jaxpaged.models.parameters import fill, parameter_specs, place
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import (
    INDEX_FILE,
    OVERFLOWING,
    TensorFolder,
    TensorSpec,
    is_unusable,
    read_json,
    warn_of_unusable,
    write_tensors,
)

SPOOL = "native"
"""Name of the folder inside the one that is written, for what has to change before Orbax can have it."""


def convert(
    source: Path | str,
    target: Path | str,
    *,
    to: str = NATIVE,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> ConversionReport:
    """Write the checkpoint `source`, of any format, as `target` in the format `to`, and return what was done.

    `to` is native, huggingface (config.json and safetensors that transformers loads) or orbax. `dtype` None keeps the
    checkpoint's own (float16 is widened to float32). `target` appears complete or not at all; what a killed conversion
    to it left is removed. Tokenizer files and generation_config.json are copied along, code never. One tensor is in
    memory at a time. Whatever is wrong raises ValueError naming file and tensor, and nothing is written.
    """
    for name, path in (("source", source), ("target", target)):
        if not str(path).strip():
            raise ValueError(f"the {name} is empty: give the path of a folder")
    source, target = Path(source), Path(target)
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"{target}: is the source: choose another target")
    _check_target(target, to, overwrite=overwrite)
    started = time.perf_counter()
    with open_source(source, dtype) as opened:
        if opened.format == to and (dtype is None or not opened.changes.get("cast")):
            raise ValueError(f"{source}: is a {to} checkpoint already: load it as it is")
        return _write(opened, target, to, overwrite, show_progress, max_shard_bytes, started)


def from_state(
    state: Any,
    config: ModelConfig,
    target: Path | str,
    *,
    to: str = NATIVE,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> ConversionReport:
    """Write a live Flax model, for example one that was just trained, as `target`, and return what was done.

    `state` is the module, its `nnx.state`, or the same as nested dictionaries; `config` are its facts. `tokenizer` is a
    folder whose tokenizer files and generation_config.json are copied along. Each parameter must be there exactly once,
    in its shape; else ValueError by name, and nothing is written. For the rest see `convert`.
    """
    if not str(target).strip():
        raise ValueError("the target is empty: give the path of a folder")
    target = Path(target)
    _check_target(target, to, overwrite=overwrite)
    started = time.perf_counter()
    companions = {} if tokenizer is None else checkpoint.companions_of(Path(tokenizer))
    if tokenizer is not None and not companions:
        raise ValueError(f"tokenizer={str(tokenizer)!r} has no tokenizer files: give the folder of a model")
    opened = of_state(state, config, companions.values())
    return _write(opened, target, to, overwrite, show_progress, max_shard_bytes, started)


def read_config(folder: Path, dtype: str | None) -> ModelConfig:
    """Return the facts of a folder of any format, with its weights kept as `dtype` (None: its own).

    Everything is checked that `load` checks before it reads a weight; ValueError names file and tensor.
    """
    kind = format_of(folder)
    if kind == HUGGINGFACE:
        with open_checkpoint(folder, dtype) as opened:
            return opened.config
    if kind == ORBAX:
        with orbax.open_folder(folder, dtype) as stored:
            return stored.config
    config = checkpoint.read_config(folder)
    checkpoint.check_weights(folder, config)
    return config if dtype is None else checkpoint.config_with_dtype(config, dtype)


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    show_progress: bool = False,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
) -> tuple[ModelConfig, Decoder]:
    """Return the facts and the filled model of a folder of any format; see the `load` of each."""
    loaders: dict[str, Callable[..., tuple[ModelConfig, Decoder]]] = {
        NATIVE: checkpoint.load, HUGGINGFACE: load_huggingface, ORBAX: orbax.load,
    }  # fmt: skip
    with _without_collections():
        return loaders[format_of(Path(folder))](
            folder, dtype=dtype, max_model_len=max_model_len, show_progress=show_progress, put=put
        )


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep Python from looking for circular garbage: a load makes none, and each look at all there is takes 60 ms."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_state(
    state: Any,
    config: ModelConfig,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    show_progress: bool = False,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
) -> tuple[ModelConfig, Decoder]:
    """Return the facts and a model with the parameters of a live one (see `from_state`).

    Parameters of the asked dtype are shared, not copied; `state` may be a module, `nnx.state` of it, or dictionaries.
    """
    checkpoint.check_dtype(dtype)
    if dtype is not None:
        config = checkpoint.config_with_dtype(config, dtype)
    opened = of_state(state, config, ())
    model = build_abstract(config, max_model_len=max_model_len)

    def draw() -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        for path in tqdm(parameter_specs(model), unit="tensor", desc="weights", disable=not show_progress):
            view = opened.view(path)
            yield path, opened.read(path) if view is None else view

    return config, fill(model, draw(), put=put or place)


def _check_target(target: Path, to: str, *, overwrite: bool) -> None:
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not a format: it must be one of {', '.join(FORMATS)}")
    may_replace, kind = {
        NATIVE: (checkpoint.is_ours, "a native checkpoint"),
        HUGGINGFACE: (_is_plain_huggingface, "a Hugging Face checkpoint without other files"),
        ORBAX: (orbax.is_ours, "an Orbax folder of ours"),
    }[to]
    checkpoint.check_target(target, overwrite=overwrite, may_replace=may_replace, kind=kind)


def _is_plain_huggingface(folder: Path) -> bool:
    """Say whether the folder holds what `convert` writes for transformers, and nothing else."""
    path = folder / checkpoint.CONFIG_FILE
    if not path.is_file() or "architectures" not in (values := read_json(path)) or "format" in values:
        return False
    known = {checkpoint.CONFIG_FILE, INDEX_FILE, *checkpoint.COMPANION_FILES}
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
    return all(
        entry.is_file() and (entry.name in known or weights.fullmatch(entry.name)) for entry in folder.iterdir()
    )


def _write(
    source: Source, target: Path, to: str, overwrite: bool, show_progress: bool, max_shard_bytes: int, started: float
) -> ConversionReport:
    specs = checkpoint.parameter_files(source.config)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    changes = dict(source.changes)
    # before anything is written: what cannot be said in the words of the target is refused here
    exports = _exports(source.config, specs, str(source.folder or "state")) if to == HUGGINGFACE else ()
    spooled = to == ORBAX and any(source.view(path) is None for path in specs)
    checkpoint.check_disk(target, num_bytes * (2 if spooled else 1))
    removed = remove_dead_partials(target.absolute())
    with (
        tqdm(total=len(exports or specs), unit="tensor", desc="converting", disable=not show_progress) as bar,
        new_folder(target) as partial,
    ):
        if to == NATIVE:
            files = write_tensors(
                partial, specs, _told(source.read, bar), max_shard_bytes=max_shard_bytes
            )
            values = checkpoint.config_values(source.config)
        elif to == HUGGINGFACE:
            files = _write_exports(partial, exports, source, bar, max_shard_bytes)
            values = ARCHITECTURES[source.config.architecture].untranslate(source.config)
            changes |= _changes_of(exports)
        else:
            _write_orbax(partial, source, specs, spooled, bar)
            files, values = (), orbax.config_values(source.config)
        checkpoint.write_facts(partial, values, source.companions)
    return ConversionReport(
        source=source.folder, source_format=source.format, target=target, target_format=to,
        architecture=source.config.architecture, dtype=source.config.dtype,
        num_source_tensors=source.num_tensors, num_target_tensors=len(exports or specs),
        num_elements=num_bytes // checkpoint.NUMPY_DTYPES[source.config.dtype].itemsize, num_bytes=num_bytes,
        changes=changes, ignored=source.ignored, weight_files=files, copied_files=tuple(source.companions),
        removed_folders=removed, duration_s=time.perf_counter() - started,
    )  # fmt: skip


def _told(read: Callable[[str], np.ndarray], bar: Any) -> Callable[[str], np.ndarray]:
    def told(name: str) -> np.ndarray:
        array = read(name)
        bar.update()
        return array

    return told


def _exports(config: ModelConfig, specs: dict[str, TensorSpec], where: str) -> tuple[Export, ...]:
    conversion = ARCHITECTURES.get(config.architecture)
    if conversion is None:
        raise ValueError(f"{where}: {config.architecture} has no converter: there is one for {sorted(ARCHITECTURES)}")
    try:
        conversion.untranslate(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return make_exports(conversion.rules(config), {path: spec.shape for path, spec in specs.items()}, where)


def _changes_of(exports: tuple[Export, ...]) -> dict[str, int]:
    return {
        "renamed": sum(export.name != export.parameters[0] for export in exports),
        "transposed": sum(export.row.transform is TRANSPOSE for export in exports),
        "joined": sum(isinstance(export.row, Split) for export in exports),
        "unstacked": sum(export.entry is not None for export in exports),
    }


def _write_exports(
    partial: Path, exports: tuple[Export, ...], source: Source, bar: Any, max_shard_bytes: int
) -> tuple[str, ...]:
    by_name = {export.name: export for export in exports}
    dtype = checkpoint.NUMPY_DTYPES[source.config.dtype]
    stacked: dict[str, np.ndarray] = {}  # the one whose entries are being written

    def read_stacked(path: str) -> np.ndarray:
        if path not in stacked:
            stacked.clear()
            stacked[path] = source.read(path)
        return stacked[path]

    def build(name: str) -> np.ndarray:
        export = by_name[name]
        if export.entry is None:
            stacked.clear()
        return export.build(source.read if export.entry is None else read_stacked)

    specs = {export.name: TensorSpec("", dtype, export.shape) for export in exports}
    return write_tensors(partial, specs, _told(build, bar), max_shard_bytes=max_shard_bytes, format_name="pt")


def _is_unusable(view: np.ndarray | jax.Array) -> bool:
    if isinstance(view, np.ndarray):
        return is_unusable(view)
    return not (jnp.abs(view) < OVERFLOWING).all()  # where it is: no copy of it comes to the host


def _write_orbax(
    partial: Path, source: Source, specs: dict[str, TensorSpec], spooled: bool, bar: Any
) -> None:
    """Write the checkpoint from views, so that no more is in memory than is under way to the disk.

    Orbax takes a whole tree: what has to change on its way goes through native files, which are views of themselves.
    """
    if not spooled:
        views = {path: view for path in specs if (view := source.view(path)) is not None}
        warn_of_unusable([path for path, view in views.items() if _is_unusable(view)], stacklevel=5)
        orbax.save(partial / orbax.SUBFOLDER, views)
        bar.update(len(specs))
        return
    spool = partial / SPOOL
    spool.mkdir()
    write_tensors(spool, specs, _told(source.read, bar), max_shard_bytes=checkpoint.MAX_SHARD_BYTES)
    with TensorFolder(spool) as tensors:
        orbax.save(partial / orbax.SUBFOLDER, {path: tensors.mapped(path) for path in specs})
    remove_folder(spool)
