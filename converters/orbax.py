"""Orbax checkpoints: a folder with our facts in config.json, the tokenizer's files, and the checkpoint in `orbax/`.

The tree is that of `nnx.state(model)`: what a trainer in JAX saves (`orbax_tree.py`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from converters.orbax_library import library, naming, saving
from converters.orbax_tree import TREE, nest, plain_arrays, refuse_surroundings, stored_leaves
from converters.plain_zarr import PlainReader
from jaxpaged.models import checkpoint
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.data_file import cast
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import check_names, fill, is_used_in_place, parameter_specs, place
from jaxpaged.models.read_ahead import ReadAhead
from jaxpaged.models.registry import build_abstract
from jaxpaged.models.tensor_files import read_json

FORMAT = "jaxpaged-orbax"
SUBFOLDER = "orbax"
MARKS = ("_CHECKPOINT_METADATA", TREE)
"""Files that tell an Orbax checkpoint."""
CHUNK_BYTES = 64 * 2**20
"""Of an array in the files: a device that restores its part reads whole chunks."""
MOST_READ = 16
"""Bytes for each element of an array that reading its chunks may take: no chunk is larger than its array by much."""
GROUPS = 16
"""In how many steps a checkpoint is restored: each reads the tree's metadata again."""


def looks_like_orbax(folder: Path) -> bool:
    """Say whether the folder, or one named `orbax` in it, is an Orbax checkpoint."""
    return any((place / mark).is_file() for place in (folder, folder / SUBFOLDER) for mark in MARKS)


def is_ours(folder: Path) -> bool:
    """Say whether the folder is what `write` makes, with nothing of others in it."""
    path = folder / checkpoint.CONFIG_FILE
    if not path.is_file() or read_json(path).get("format") != FORMAT:
        return False
    return [entry.name for entry in folder.iterdir() if entry.is_dir()] in ([], [SUBFOLDER])


def config_values(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json holds."""
    return checkpoint.config_values(config) | {"format": FORMAT}


def read_config(folder: Path) -> ModelConfig:
    """Return the facts beside an Orbax checkpoint; ValueError naming the file."""
    return checkpoint.read_config(folder, format_name=FORMAT)


def save(folder: Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Write the parameters as an Orbax checkpoint `folder`, which must not be there; OSError if it cannot be written.

    No array is copied in memory, so that views of files stay on the disk. Chunks are plain files (`plain_zarr.py`).
    """
    ocp = library()
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
    )
    tree = nest({tuple(name.split(".")): array for name, array in arrays.items()})
    options = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False, use_ocdbt=False)
    with saving(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            folder.absolute(), ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda leaf: options, tree))
        )


@dataclass(frozen=True)
class OpenFolder:
    """A checked Orbax folder: everything is known but the data."""

    path: Path
    config: ModelConfig
    model: Decoder
    """With shapes in place of weights."""
    num_cast: int
    plain: ReadAhead | None = None
    """Reads parameters where each is in plain files; else orbax restores them, and needs what follows."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where each parameter is in the tree, by path."""
    most_bytes: Mapping[str, int] = field(default_factory=dict)
    """What reading a parameter takes at most: whole chunks, in the files or in memory."""

    def read(self, name: str) -> np.ndarray:
        """Return a parameter as numpy has it."""
        dtype = checkpoint.NUMPY_DTYPES[self.config.dtype]
        if self.plain is not None:
            with naming(self.path, f"parameter {name!r}"):
                return cast(self.plain.read(name), dtype)
        ocp = library()
        return self._restore([name], lambda path: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))[0]

    def restore(self, names: Sequence[str], sharding: Callable[[str], jax.sharding.Sharding]) -> list[jax.Array]:
        """Return parameters, each restored straight onto the devices that `sharding` gives for its path."""
        ocp = library()
        dtype = checkpoint.NUMPY_DTYPES[self.config.dtype]
        return self._restore(names, lambda path: ocp.ArrayRestoreArgs(sharding=sharding(path), dtype=dtype))

    def _restore(self, names: Sequence[str], options: Callable[[str], Any]) -> list[Any]:
        ocp = library()
        specs = parameter_specs(self.model)
        # so that no second large one is read beside a large one
        most_bytes = max(self.most_bytes[name] for name in names) + 2**20
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=most_bytes / 1e9)
        wanted = {self.names[name]: jax.ShapeDtypeStruct(specs[name].shape, specs[name].dtype) for name in names}
        arguments = {self.names[name]: options(name) for name in names}
        what = f"parameter {names[0]!r}" if len(names) == 1 else f"one of {names[0]!r} to {names[-1]!r}"
        with naming(self.path, what), ocp.Checkpointer(handler) as checkpointer:
            restored = checkpointer.restore(
                self.path.absolute(),
                args=ocp.args.PyTreeRestore(nest(wanted), restore_args=nest(arguments), partial_restore=True),
            )
        found = []
        for name in names:
            node = restored
            for key in self.names[name]:
                node = node[key]
            found.append(node)
        return found


@contextmanager
def open_folder(folder: Path, dtype: str | None, *, max_model_len: int | None = None) -> Iterator[OpenFolder]:
    """Check facts, names, shapes and element types of an Orbax folder, and give it open for reading.

    ValueError, naming the folder and the parameters, for whatever is not as it should be.
    """
    checkpoint.check_dtype(dtype)
    config = read_config(folder)
    checkpoint.read_generation_defaults(folder)
    if dtype is not None:
        config = checkpoint.config_with_dtype(config, dtype)
    path = folder / SUBFOLDER
    if not path.is_dir():
        raise ValueError(f"{path}: not there: an Orbax folder has its checkpoint in {SUBFOLDER}/; convert it again")
    model = build_abstract(config, max_model_len=max_model_len)
    specs = parameter_specs(model)
    arrays = plain_arrays(path)
    leaves = stored_leaves(path) if arrays is None else {name: ((), array) for name, array in arrays.items()}
    refuse_surroundings(leaves, specs, path)
    check_names(leaves, specs, str(path))
    for name, spec in specs.items():
        shape, stored = leaves[name][1].shape, np.dtype(leaves[name][1].dtype)
        if tuple(shape) != tuple(spec.shape):
            raise ValueError(
                f"{path}: parameter {name!r} has shape {list(shape)}: config.json says {list(spec.shape)}"
            )
        if stored not in checkpoint.NUMPY_DTYPES.values():
            raise ValueError(
                f"{path}: parameter {name!r} has element type {stored}: only {list(checkpoint.NUMPY_DTYPES)} are read"
            )
    num_cast = sum(np.dtype(leaf.dtype) != checkpoint.NUMPY_DTYPES[config.dtype] for _, leaf in leaves.values())
    if arrays is None:
        places = {name: keys for name, (keys, _) in leaves.items()}
        most_bytes = {name: _read_bytes(leaf, config.dtype) for name, (_, leaf) in leaves.items()}
        for name, spec in specs.items():
            # a chunk that there is no memory for would end the process, in the library that reads it
            if most_bytes[name] > MOST_READ * math.prod(spec.shape) + 2**20:
                leaf: Any = leaves[name][1]
                raise ValueError(
                    f"{path}: parameter {name!r} is in chunks of {list(leaf.storage.chunk_shape)}, far larger than "
                    f"its shape {list(spec.shape)}: save it again"
                )
        yield OpenFolder(path, config, model, num_cast, names=places, most_bytes=most_bytes)
        return
    for name, array in arrays.items():
        with naming(path, f"parameter {name!r}"):
            array.check()
    with PlainReader() as reader:
        plain = ReadAhead(lambda name: reader.begin(arrays[name]), lambda name: arrays[name].num_bytes)
        yield OpenFolder(path, config, model, num_cast, plain=plain)


def _read_bytes(leaf: Any, dtype: str) -> int:
    """Return the bytes of the chunks that cover an array, in the files or in `dtype`, whichever is more."""
    itemsize = max(np.dtype(leaf.dtype).itemsize, checkpoint.NUMPY_DTYPES[dtype].itemsize)
    chunk = leaf.storage.chunk_shape if leaf.storage is not None and leaf.storage.chunk_shape else leaf.shape
    return itemsize * math.prod(-(-size // length) * length for size, length in zip(leaf.shape, chunk, strict=True))


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    show_progress: bool = False,
    put: Callable[[str, jax.Array | np.ndarray], jax.Array] | None = None,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> tuple[ModelConfig, Decoder]:
    """Return the facts and the filled model of an Orbax folder.

    Parameters are restored straight onto the devices that `sharding(path)` gives (default: the default device). With
    `put` they come to the host one at a time, and `put(path, array)` places each.
    """
    if put is not None and sharding is not None:
        raise ValueError("put and sharding both say where parameters go: give one of them")
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_folder(Path(folder), dtype, max_model_len=max_model_len) as opened:
        names = list(parameter_specs(opened.model))
        group_size = 1 if opened.plain is not None or put is not None else max(1, -(-len(names) // GROUPS))
        if opened.plain is not None:
            are_kept = put is None and sharding is None and is_used_in_place() and not opened.num_cast
            opened.plain.expect(names, are_kept=are_kept)

        def draw() -> Iterator[tuple[str, Any]]:
            with tqdm(total=len(names), unit="tensor", desc="weights", disable=not show_progress) as bar:
                for start in range(0, len(names), group_size):
                    group = names[start : start + group_size]
                    if opened.plain is not None or put is not None:
                        yield group[0], opened.read(group[0])
                    else:
                        yield from zip(
                            group, opened.restore(group, sharding or (lambda path: on_device)), strict=True
                        )
                    bar.update(len(group))

        def spread(path: str, array: jax.Array | np.ndarray) -> jax.Array:
            return place(path, array) if sharding is None else jax.device_put(array, sharding(path))

        return opened.config, fill(opened.model, draw(), put=put or spread)


