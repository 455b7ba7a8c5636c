"""Our own checkpoint format: a folder with the facts (config.json), the weights by our paths, and copied text files.

`config.json` holds ModelConfig and says `"format": "jaxpaged"`; weights are safetensors, in one file or in shards with
an index; tokenizer files and generation_config.json stand beside them as they came.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from jaxpaged.models.config import DTYPES, GenerationDefaults, ModelConfig
from jaxpaged.models.data_file import cast
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.new_folder import new_folder
from jaxpaged.models.parameters import (
    check_names,
    fill,
    is_used_in_place,
    parameter_arrays,
    parameter_specs,
    place,
)
from jaxpaged.models.registry import build_abstract, parse_config
from jaxpaged.models.tensor_files import TensorFolder, TensorSpec, read_json, write_tensors

FORMAT = "jaxpaged"
FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
GENERATION_REMEDY = "correct it there, or take the field out to go without it"
COMPANION_FILES = (
    GENERATION_FILE,
    "tokenizer.json",
    TOKENIZER_CONFIG_FILE,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files copied along, where they are there. Nothing else is: above all no code."""
MAX_SHARD_BYTES = 4 * 2**30

NUMPY_DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError unless `dtype` is None (the checkpoint's own) or one that weights may be kept as."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES}, or None for the checkpoint's own")


def refuse_remote_code(folder: Path) -> None:
    """Raise ValueError, naming the file, if one of the folder's asks for code of the checkpoint."""
    for path in (folder / CONFIG_FILE, folder / TOKENIZER_CONFIG_FILE):
        if path.is_file() and read_json(path).get("auto_map"):
            raise ValueError(f"{path}: auto_map asks for code of the checkpoint: no remote code is ever run")


def is_native(folder: Path) -> bool:
    """Say whether the folder holds our format."""
    return (folder / CONFIG_FILE).is_file() and read_json(folder / CONFIG_FILE).get("format") == FORMAT


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Return what the folder's generation_config.json recommends; all None where there is no such file.

    ValueError naming file, field and value for what no request could use.
    """
    values = _read_generation_config(folder)
    try:
        return GenerationDefaults.from_generation_config(values)
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION_FILE}: {error}; {GENERATION_REMEDY}") from error


def with_stop_tokens(folder: Path, config: ModelConfig) -> ModelConfig:
    """Return the config with the stop tokens of the folder's generation_config.json, where it names some: they win.

    ValueError naming file, field and value for what is no token of the vocabulary.
    """
    found = _read_generation_config(folder).get("eos_token_id")
    if found is None:
        return config
    token_ids = found if isinstance(found, list) else [found]
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"{folder / GENERATION_FILE}: eos_token_id={repr(token_id)[:80]} must be a token id from 0 to "
                f"{config.vocab_size - 1}, or a list of them; {GENERATION_REMEDY}"
            )
    return dataclasses.replace(config, eos_token_ids=tuple(token_ids))


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION_FILE
    return read_json(path) if path.is_file() else {}


def read_config(folder: Path, *, format_name: str = FORMAT) -> ModelConfig:
    """Return the facts of a native checkpoint, with the stop tokens of its generation_config.json where it names some.

    `format_name` is what config.json calls a format that keeps its facts in the same way. ValueError naming the file
    for anything else.
    """
    refuse_remote_code(folder)
    path = folder / CONFIG_FILE
    values = read_json(path)
    if values.pop("format", None) != format_name:
        raise ValueError(f"{path}: not a native checkpoint: convert it with `python -m converters {folder} TARGET`")
    if (version := values.pop("format_version", None)) != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={version!r}, and this version reads {FORMAT_VERSION}: convert it again"
        )
    try:
        config = parse_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return with_stop_tokens(folder, config)


def is_ours(folder: Path) -> bool:
    """Say whether the folder is a native checkpoint with nothing of others in it."""
    return is_native(folder) and not any(path.is_dir() for path in folder.iterdir())


def check_target(
    folder: Path,
    *,
    overwrite: bool,
    may_replace: Callable[[Path], bool] = is_ours,
    kind: str = "a native checkpoint",
) -> None:
    """Raise ValueError unless a checkpoint may be written to `folder`: it is absent, empty, or ours to overwrite.

    `may_replace` says whether a folder is a checkpoint of this format and nothing else, `kind` what that is called.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder: choose another target")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: exists: choose another target, or pass overwrite=True (--overwrite)")
    if not may_replace(folder):
        raise ValueError(f"{folder}: exists and is not {kind}, so it is not overwritten: remove it first")


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise ValueError unless the disk that `folder` will be on has so much free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < num_bytes:
        raise ValueError(
            f"{folder}: needs {num_bytes:,} bytes and its disk has {free:,} free: make room or choose another disk"
        )


def parameter_files(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return what the parameters of a model are in files, by path."""
    dtype = NUMPY_DTYPES[config.dtype]
    return {
        name: TensorSpec("", dtype, tuple(spec.shape))
        for name, spec in parameter_specs(build_abstract(config)).items()
    }


def config_values(config: ModelConfig) -> dict[str, Any]:
    """Return what a native checkpoint's config.json holds."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION} | config.as_json()


def write(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    *,
    companions: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[str, ...]:
    """Write a native checkpoint whose parameters come from `read(path)`, and return the names of its weight files.

    Each parameter is drawn once and one is in memory at a time. `folder` appears complete or not at all.
    """
    check_target(folder, overwrite=overwrite)
    specs = parameter_files(config)
    check_disk(folder, sum(spec.num_bytes for spec in specs.values()))
    with new_folder(folder.absolute()) as partial:
        files = write_tensors(partial, specs, read, max_shard_bytes=max_shard_bytes)
        write_facts(partial, config_values(config), companions)
    return files


def write_facts(folder: Path, values: Mapping[str, Any], companions: Mapping[str, Path] | None) -> None:
    """Write config.json into a folder that is being made, and copy along what goes with it."""
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1) + "\n")
    for name, source in (companions or {}).items():
        shutil.copyfile(source, folder / name)


def companions_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that are copied along, by name."""
    return {name: folder / name for name in COMPANION_FILES if (folder / name).is_file()}


def save(
    folder: Path | str,
    config: ModelConfig,
    model: Decoder,
    *,
    companions: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as a native checkpoint; `companions` maps names to files to copy along (tokenizer and so on)."""
    arrays = parameter_arrays(model)

    def read(name: str) -> np.ndarray:
        return np.asarray(arrays[name])

    write(
        Path(folder),
        config,
        read,
        companions=companions,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    show_progress: bool = False,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
) -> tuple[ModelConfig, Decoder]:
    """Return the facts and the filled model of a native checkpoint.

    `dtype` None keeps the checkpoint's own. Tensors are read one at a time, each placed by `put(path, array)` (default:
    on the default device) before the next. Missing, extra and wrong-shape parameters raise ValueError by name before
    any weight is read.
    """
    folder = Path(folder)
    check_dtype(dtype)
    config = read_config(folder)
    if dtype is not None:
        config = config_with_dtype(config, dtype)
    model = build_abstract(config, max_model_len=max_model_len)
    with open_weights(folder, model) as tensors:
        dtype_kept = NUMPY_DTYPES[config.dtype]
        are_kept = put is None and is_used_in_place() and all(s.dtype == dtype_kept for s in tensors.specs.values())
        tensors.expect(tensors.specs, are_kept=are_kept)
        arrays = _cast(tensors, dtype_kept, show_progress=show_progress)
        return config, fill(model, arrays, put=put or place)


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Raise ValueError, as `load` does, unless the folder's weight files are whole and have every parameter.

    Reads their headers and no weight.
    """
    with open_weights(folder, build_abstract(config)):
        pass


@contextmanager
def open_weights(folder: Path, model: Decoder) -> Iterator[TensorFolder]:
    """Give the weights of a native checkpoint open for reading; ValueError, as `load` does, unless they are whole."""
    specs = parameter_specs(model)
    with TensorFolder(folder) as tensors:
        check_names(tensors.specs, specs, str(folder))
        for name, spec in specs.items():
            if tensors.specs[name].shape != tuple(spec.shape):
                raise ValueError(
                    f"{folder / tensors.specs[name].file}: parameter {name!r} has shape "
                    f"{list(tensors.specs[name].shape)}: config.json says {list(spec.shape)}"
                )
        yield tensors


def _cast(tensors: TensorFolder, dtype: np.dtype, *, show_progress: bool) -> Iterator[tuple[str, np.ndarray]]:
    total = sum(spec.num_bytes for spec in tensors.specs.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as bar:
        for name, spec in tensors.specs.items():
            yield name, cast(tensors.read(name), dtype)
            bar.update(spec.num_bytes)


def config_with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """Return the same facts with the weights kept as `dtype`."""
    return dataclasses.replace(config, dtype=dtype)
