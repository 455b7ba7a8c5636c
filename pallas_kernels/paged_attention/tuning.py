"""Sizes of kernels that were found by measurement, by kind of device: tuned/<device kind>.json.

`python -m bench.kernels tune` writes such a file. Without one, or where it has nothing that is near enough, kernels
take their own defaults: sizes change how long a kernel takes, never whether it is right.

    {"device": "NVIDIA H200", "entries": [{
        "implementation": "mosaic_gpu", "dtype": "bfloat16", "head_dim": 128, "block_size": 16,
        "num_kv_heads": 8, "group": 4,
        "launch": {"decode_programs": 2112}, "tiles": {"tile_size": 128}, "measured": {...}}]}

`launch` is what the implementation's `Launch` is made with, `tiles` what a host cuts tiles by; `measured` is for
people to read.
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pallas_kernels.platform import target_device_kind

FOLDER = Path(__file__).parent / "tuned"
TILES = ("tile_size", "key_chunk_tokens")
LAUNCHES: dict[str, tuple[str, ...]] = {
    "mosaic_gpu": (
        "decode_programs", "programs_per_multiprocessor", "decode_chunk_tokens", "max_decode_stages",
        "min_item_chunks",
    ),
    "triton_gpu": ("decode_programs", "min_item_chunks", "decode_turn_tokens", "decode_warps", "num_stages"),
    "mosaic_tpu": ("decode_chunk_bytes", "max_decode_chunk_tokens"),
}  # fmt: skip
"""By implementation, the fields of its `Launch` that may be tuned: those that leave what tiles give as it is, to the
bit, since they may be others at another block size."""
POWERS_OF_TWO = ("decode_turn_tokens", "decode_warps", "tile_size", "key_chunk_tokens")
MAX_SIZE = 2**30


@dataclass(frozen=True, kw_only=True)
class ShapeClass:
    """What the best sizes depend on, beside the device."""

    implementation: str
    """Its name in IMPLEMENTATIONS."""
    dtype: str
    """Logical dtype of the cache."""
    head_dim: int
    block_size: int
    num_kv_heads: int
    group: int
    """Query heads of a key-value head."""


NAMES, COUNTS = ("implementation", "dtype"), ("head_dim", "block_size", "num_kv_heads", "group")
"""The fields of a ShapeClass."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those that were found; what is not in them is the default."""

    launch: Mapping[str, int] = field(default_factory=dict)
    tiles: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One entry of a file."""

    shape: ShapeClass
    sizes: Sizes
    measured: Mapping[str, Any]
    """By whom and when: the file's own business."""

    def as_json(self) -> dict[str, Any]:
        sizes = {"launch": dict(self.sizes.launch), "tiles": dict(self.sizes.tiles)}
        return vars(self.shape) | sizes | {"measured": dict(self.measured)}


def tuned_sizes(shape: ShapeClass) -> Sizes:
    """What was found for the device that is traced for, or for the nearest shape; nothing where none is near."""
    return nearest(_entries_or_warning(path_of(target_device_kind())), shape)


def path_of(device_kind: str) -> Path:
    """Where the sizes for a kind of device are kept, whether there are any or not."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device_kind)}.json"


def nearest(entries: Iterable[Entry], shape: ShapeClass) -> Sizes:
    """The sizes of the entry whose heads are nearest, of those that are alike in all else.

    What fits in registers and shared memory depends on dtype, head dim and block size, so these must be equal. The
    distance of heads is the sum of the octaves between their numbers; of equally near entries the first counts.
    """
    alike = [entry for entry in entries if _kernel_of(entry.shape) == _kernel_of(shape)]

    def distance(entry: Entry) -> float:
        return sum(
            abs(math.log2(getattr(entry.shape, name) / getattr(shape, name))) for name in ("num_kv_heads", "group")
        )

    return min(alike, key=distance).sizes if alike else Sizes()


def read_entries(path: Path) -> tuple[Entry, ...]:
    """All entries of a file; none if there is no file. Raises ValueError with the first thing that is wrong."""
    if not path.exists():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError('it must be {"device": ..., "entries": [...]}')
    entries = tuple(_read_entry(entry, f"entry {index}") for index, entry in enumerate(content["entries"]))
    for index, entry in enumerate(entries):
        if entry.shape in [other.shape for other in entries[:index]]:
            raise ValueError(f"entry {index} is of the same shape as an earlier one")
    return entries


def write_entries(path: Path, device_kind: str, entries: Iterable[Entry]) -> None:
    """Write a file of these entries and of those that it has for other shapes. ValueError where it has others' faults.

    A process that has read the file keeps what it read.
    """
    chosen = {entry.shape: entry for entry in (*read_entries(path), *entries)}
    content = {"device": device_kind, "entries": [entry.as_json() for entry in chosen.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # replaced as a whole: who reads it, or ends this process, never meets half a file
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def check_sizes(shape: ShapeClass, sizes: Sizes) -> None:
    """Raises ValueError, with the name, for a size that this implementation does not have or cannot be run with."""
    known = LAUNCHES.get(shape.implementation)
    if known is None:
        raise ValueError(f"implementation {shape.implementation!r} has no sizes: use one of {', '.join(LAUNCHES)}")
    for kind, names, found in (("launch", known, sizes.launch), ("tiles", TILES, sizes.tiles)):
        for name, value in found.items():
            if name not in names:
                raise ValueError(f"{kind} size {name!r} is unknown: {shape.implementation} has {', '.join(names)}")
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 to {MAX_SIZE}")
            if name in POWERS_OF_TWO and value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")
    turn = sizes.tiles.get("key_chunk_tokens")
    if turn is not None and turn % shape.block_size:
        raise ValueError(f"key_chunk_tokens={turn} must be a multiple of the block size {shape.block_size}")
    chunk = sizes.launch.get("decode_chunk_tokens")
    if chunk is not None and (chunk not in (64, 128) or max(chunk, shape.block_size) % min(chunk, shape.block_size)):
        raise ValueError(
            f"decode_chunk_tokens={chunk} must be 64 or 128, and a multiple or a fraction of the block size "
            f"{shape.block_size}"
        )


def _kernel_of(shape: ShapeClass) -> tuple[str, str, int, int]:
    return shape.implementation, shape.dtype, shape.head_dim, shape.block_size


@functools.cache
def _entries_or_warning(path: Path) -> tuple[Entry, ...]:
    """Once a process: a file that is broken is told of, and costs speed only."""
    try:
        return read_entries(path)
    except ValueError as error:
        warnings.warn(
            f"the tuned sizes in {path} are not used, kernels take their defaults: {error}. Mend or delete the file, "
            "or have it written anew by python -m bench.kernels tune",
            stacklevel=2,
        )
        return ()


def _read_entry(entry: Any, where: str) -> Entry:
    fields = {*NAMES, *COUNTS}
    if not isinstance(entry, dict) or not fields <= set(entry) <= fields | {"launch", "tiles", "measured"}:
        raise ValueError(f"{where} must be an object with {', '.join((*NAMES, *COUNTS))}, and launch, tiles, measured")
    for name in NAMES:
        if not isinstance(entry[name], str):
            raise ValueError(f"{where}: {name}={entry[name]!r} must be a name")
    for name in COUNTS:
        value = entry[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{where}: {name}={value!r} must be a whole number from 1 to {MAX_SIZE}")
    parts = {name: entry.get(name, {}) for name in ("launch", "tiles", "measured")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{where}: {name} must be an object, not {part!r}")
    shape = ShapeClass(**{name: entry[name] for name in (*NAMES, *COUNTS)})
    sizes = Sizes(launch=parts["launch"], tiles=parts["tiles"])
    try:
        check_sizes(shape, sizes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Entry(shape, sizes, parts["measured"])
