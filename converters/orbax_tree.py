"""The tree of an Orbax checkpoint: which arrays it has, and where they are."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from converters.orbax_library import library, naming
from converters.plain_zarr import FACTS_FILE, PlainArray, plain_array
from jaxpaged.models import checkpoint
from jaxpaged.models.tensor_files import read_json

TREE = "_METADATA"
"""The file that describes the tree."""
DATABASE = "manifest.ocdbt"
"""Where Orbax has put arrays into a key-value database, as it does by default."""
ARRAY_KINDS = ("np.ndarray", "jax.Array")
"""What the tree calls an array, which has a folder with one of these files unless there is a database."""
FACTS_FILES = (FACTS_FILE, "zarr.json")


def plain_arrays(path: Path) -> dict[str, PlainArray] | None:
    """Return every array of a checkpoint whose arrays are all plain files, by our path; None for any other.

    Names are those of the tree in Orbax's own metadata, which it gives the folders of arrays too. ValueError for a tree
    that is not described, or an array that has no folder.
    """
    described = _described(path)
    if (path / DATABASE).exists():
        return None
    found: dict[str, PlainArray] = {}
    for name, kind in described:
        if kind in ARRAY_KINDS and not any((path / name / facts).is_file() for facts in FACTS_FILES):
            raise ValueError(f"{path}: parameter {_our_path(name)!r} is not there: copy or convert it again")
        array = plain_array(path / name, checkpoint.NUMPY_DTYPES.values())
        if array is None or _our_path(name) in found:
            return None
        found[_our_path(name)] = array
    return found


def _described(path: Path) -> list[tuple[str, Any]]:
    """Return the name and the kind of each leaf, as the checkpoint describes them; ValueError naming the file."""
    file = path / TREE
    if not file.is_file():
        raise ValueError(f"{file}: not there, and nothing else says what the checkpoint has: copy or convert it again")
    try:
        leaves = [
            (".".join(str(key["key"]) for key in leaf["key_metadata"]), leaf["value_metadata"]["value_type"])
            for leaf in read_json(file)["tree_metadata"].values()
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: does not describe a tree of arrays: copy or convert the checkpoint again") from error
    for name, _ in leaves:
        if Path(name).name != name or name == "..":
            raise ValueError(f"{file}: {name!r} is no name of a parameter: only files of the folder itself are read")
    return leaves


def _our_path(name: str) -> str:
    return name.removesuffix(".value")  # of an nnx.State, is no part of it


def stored_leaves(path: Path) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return each array's keys in the tree and its metadata, by our path, as Orbax has them; else ValueError."""
    with naming(path, "the tree"):
        handler = library().PyTreeCheckpointHandler()
        flat = jax.tree_util.tree_flatten_with_path(handler.metadata(path.absolute()).tree)[0]
        handler.close()
    leaves: dict[str, tuple[tuple[str, ...], Any]] = {}
    for keys, leaf in flat:
        names = tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(f"{path}: {'.'.join(names)!r} is no array: only parameters can be loaded")
        ours = _our_path(".".join(names))
        if ours in leaves:
            raise ValueError(f"{path}: parameter {ours!r} is there twice, with and without 'value': take one out")
        leaves[ours] = (names, leaf)
    return leaves


def refuse_surroundings(names: Collection[str], expected: Collection[str], path: Path) -> None:
    """Raise ValueError if the tree has the expected parameters as one branch of it, beside others or alone."""
    for branch in sorted({name.split(".")[0] for name in names}):
        if all(f"{branch}.{name}" in names for name in expected):
            raise ValueError(
                f"{path}: the parameters are in {branch!r} of the tree, and must be the tree: save nnx.state(model) "
                "for itself, or write it with converters.from_state"
            )


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return a tree of dictionaries of what is given by the keys that lead to it."""
    tree: dict[str, Any] = {}
    for keys, value in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree
