"""Folders of safetensors files: read one tensor at a time, written one tensor at a time. No pickle, no torch."""

import json
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpaged.models.data_file import DataFile, aligned_empty, num_readers
from jaxpaged.models.parameters import shown_names
from jaxpaged.models.read_ahead import Finish, ReadAhead

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_JSON_BYTES = 64 * 2**20
LOOKED_AT = 2**20
"""Elements looked at together for what no weight can be."""
OVERFLOWING = 2.0**64
"""The square of such a number is beyond float32, so that a norm makes nothing of it: no weight is so large."""
COMPARED_BYTES = 16 * 2**20

DTYPE_OF_CODE: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The element types that weights may have, by their code in the files."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header says about one tensor."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file; anything else raises ValueError naming the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is no file: copy it again from its source")
        if status.st_size > LARGEST_JSON_BYTES:
            raise ValueError(f"{path}: larger than {LARGEST_JSON_BYTES} bytes, which no such file should be")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): copy it again from its source") from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits too
        raise ValueError(f"{path}: not valid JSON ({type(error).__name__}): copy it again from its source") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(values).__name__}")
    return values


class TensorFolder:
    """The tensors of a folder: `specs` from the headers at once, the data one tensor at a time by `read`.

    Use it in a `with` statement. Raises ValueError, naming file and tensor, for a folder without safetensors, an index
    that names files outside the folder or disagrees with the files, a broken header, or an element type that is not a
    plain float.
    """

    specs: Mapping[str, TensorSpec]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._readers = ThreadPoolExecutor(num_readers(), "weights")
        self._stack.callback(self._readers.shutdown, cancel_futures=True)
        self._files: dict[str, DataFile] = {}
        self._ahead = ReadAhead(self._begin, lambda name: self.specs[name].num_bytes)
        self._spans: dict[str, tuple[int, int]] = {}
        """Where the data of each tensor lies in its file: start and stop, in bytes."""
        try:
            self.specs = self._read_headers()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, name: str) -> np.ndarray:
        """Return a copy of the tensor, aligned so that a CPU device can use it as it is.

        ValueError, naming it, if its data cannot be read.
        """
        with self._naming_faults(name):
            data = self._ahead.read(name)
        return data.view(self.specs[name].dtype).reshape(self.specs[name].shape)

    def expect(self, names: Iterable[str], *, are_kept: bool = False) -> None:
        """Let `read` begin with the tensors that will be read next, while the one before is used (see `ReadAhead`)."""
        self._ahead.expect(names, are_kept=are_kept)

    def _begin(self, name: str) -> Finish:
        return self._files[self.specs[name].file].begin([self._spans[name]])

    def read_ranges(self, name: str, axis: int, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return a copy of the tensor's entries from start to stop of each range along an axis.

        The ranges come one after another, in the order given. Nothing else is kept, and along axis 0 nothing else is
        read. ValueError as for `read`.
        """
        shape = self.specs[name].shape
        length = sum(stop - start for start, stop in ranges)
        if axis == 0:
            start, stop = self._spans[name]
            entry_bytes = (stop - start) // shape[0]
            spans = [(start + first * entry_bytes, start + last * entry_bytes) for first, last in ranges]
            return self._read_spans(name, spans, (length, *shape[1:]))
        view = self.mapped(name)
        wanted = (*shape[:axis], length, *shape[axis + 1 :])
        pieces = [view[(slice(None),) * axis + (slice(start, stop),)] for start, stop in ranges]
        return np.concatenate(pieces, axis=axis, out=aligned_empty(wanted, view.dtype))

    def mapped(self, name: str) -> np.ndarray:
        """Return the tensor as a view of its file, which takes no memory of its own (see `DataFile.mapped`)."""
        spec, (start, stop) = self.specs[name], self._spans[name]
        if start == stop:
            return np.empty(spec.shape, spec.dtype)
        return self._files[spec.file].mapped()[start:stop].view(spec.dtype).reshape(spec.shape)

    def has_same_data(self, left: str, right: str) -> bool:
        """Say whether two tensors are equal, bit for bit; a little of them is in memory at a time."""
        specs = (self.specs[left], self.specs[right])
        if specs[0].shape != specs[1].shape or specs[0].dtype != specs[1].dtype:
            return False
        starts = (self._spans[left][0], self._spans[right][0])
        for offset in range(0, specs[0].num_bytes, COMPARED_BYTES):
            size = min(COMPARED_BYTES, specs[0].num_bytes - offset)
            pieces = [
                self._read_spans(name, [(start + offset, start + offset + size)], (size // specs[0].dtype.itemsize,))
                for name, start in zip((left, right), starts, strict=True)
            ]
            if not np.array_equal(pieces[0].view(np.uint8), pieces[1].view(np.uint8)):
                return False
        return True

    def _read_spans(self, name: str, spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> np.ndarray:
        spec = self.specs[name]
        with self._naming_faults(name):
            return self._files[spec.file].read(spans).view(spec.dtype).reshape(shape)

    @contextmanager
    def _naming_faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{self.folder / self.specs[name].file}: tensor {name!r} cannot be read ({error}): copy the file again"
            ) from error

    def _read_headers(self) -> dict[str, TensorSpec]:
        file_of_name = read_index(self.folder)
        if file_of_name is None:
            return self._open(SINGLE_FILE)
        specs: dict[str, TensorSpec] = {}
        for file in dict.fromkeys(file_of_name.values()):
            found = self._open(file)
            listed = {name for name, its_file in file_of_name.items() if its_file == file}
            if listed - set(found):
                raise ValueError(
                    f"{self.folder / file}: missing tensors {shown_names(listed - set(found))}, which {INDEX_FILE} "
                    "places there: copy file and index again from one source"
                )
            if set(found) - listed:
                raise ValueError(
                    f"{self.folder / file}: holds tensors that {INDEX_FILE} does not place there: "
                    f"{shown_names(set(found) - listed)}: copy file and index again from one source"
                )
            specs.update(found)
        return specs

    def _open(self, file: str) -> dict[str, TensorSpec]:
        path = self.folder / file
        try:
            # the reader of the format's makers has the word on headers: all sizes and offsets agree with the file
            with safe_open(path, framework="numpy") as checked:
                slices = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118  (not a mapping)
                codes = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
            data = DataFile(path, self._readers, num_readers())
            self._stack.callback(data.close)
            spans = _spans_of_header(data)
        except (SafetensorError, OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{path}: not a readable safetensors file ({error}): it may be cut short; copy it again from its source"
            ) from error
        self._files[file] = data
        specs = {}
        for name, (code, shape) in codes.items():
            if code not in DTYPE_OF_CODE:
                raise ValueError(
                    f"{path}: tensor {name!r} has element type {code}: only {sorted(DTYPE_OF_CODE)} are read; take "
                    "the unquantized checkpoint"
                )
            specs[name] = TensorSpec(file, DTYPE_OF_CODE[code], shape)
            start, stop = self._spans[name] = spans[name]
            if stop - start != specs[name].num_bytes:
                raise ValueError(f"{path}: tensor {name!r} has {stop - start} bytes of data: copy the file again")
        return specs


def _spans_of_header(data: DataFile) -> dict[str, tuple[int, int]]:
    """Return where each tensor's data lies in a safetensors file whose header has been checked."""
    length = int.from_bytes(data.read([(0, 8)]).tobytes(), "little")
    entries = json.loads(data.read([(8, 8 + length)]).tobytes())
    entries.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in entries.items()
    }


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor, or None if the folder has one unsharded file. Names are checked, not opened."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    if not (folder / INDEX_FILE).exists():
        if (folder / SINGLE_FILE).exists():
            return None
        names = {path.name for path in folder.iterdir()}
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        others = [name for name in names if name.endswith(".safetensors")]
        if others:
            raise ValueError(
                f"{folder}: has {shown_names(others)} but no {SINGLE_FILE} and no {INDEX_FILE}: copy the index, or "
                f"rename a single file to {SINGLE_FILE}"
            )
        if pickles:
            raise ValueError(
                f"{folder / min(pickles)}: pickle files can run code and are never read; save the model as safetensors"
            )
        raise ValueError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}: copy the weights there as safetensors")
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map: copy it again from its source")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise ValueError(f"{path}: tensor {name!r} is placed in {file!r}: only files of the folder itself are read")
        if "\0" in file or not (folder / file).is_file():
            raise ValueError(f"{path}: tensor {name!r} is placed in {file!r}, which is not there: copy that file too")
    return weight_map


def shard_names(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> dict[str, str]:
    """Return the file of each tensor, in order, each file up to `max_shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    if len(shards) == 1:
        return dict.fromkeys(shards[0], SINGLE_FILE)
    return {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
    format_name: str = "jaxpaged",
) -> tuple[str, ...]:
    """Write the tensors into `folder`, drawing each from `read` once, and return the names of the files.

    Headers are known from `specs`, so that no more than one tensor is in memory; they say `format_name` (transformers
    asks for "pt"). An array that is not as its spec says raises ValueError; one that `is_unusable` is written
    as it is, and a warning names it. The `file` of a spec is not read.
    """
    unusable: list[str] = []
    file_of_name = shard_names(specs, max_shard_bytes)
    files = tuple(dict.fromkeys(file_of_name.values()))
    for file in files:
        names = [name for name in specs if file_of_name[name] == file]
        with (folder / file).open("wb") as stream:
            stream.write(_header({name: specs[name] for name in names}, format_name))
            for name in names:
                array, spec = read(name), specs[name]
                if array.shape != spec.shape or array.dtype != spec.dtype:
                    raise ValueError(
                        f"{file}: tensor {name!r} is {array.dtype}{list(array.shape)}, announced as "
                        f"{spec.dtype}{list(spec.shape)}"
                    )
                if is_unusable(array):
                    unusable.append(name)
                # the bytes, seen as integers: bfloat16 has no buffer protocol
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_of_name}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    warn_of_unusable(unusable, stacklevel=3)
    return files


def is_unusable(array: np.ndarray) -> bool:
    """Whether a float array has a NaN, an infinity or a number of OVERFLOWING or more; reads it once, copies none."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    # on integers, as bfloat16 is slow in numpy: exponents are in the order of the numbers, NaN's and infinity's last
    exponent = np.array(np.inf, array.dtype).view(bits.dtype)
    with np.errstate(over="ignore"):  # float16 ends before
        least = np.array(OVERFLOWING).astype(array.dtype).view(bits.dtype)
    return any(
        bool(((bits[at : at + LOOKED_AT] & exponent) >= least).any()) for at in range(0, bits.size, LOOKED_AT)
    )


def warn_of_unusable(names: Sequence[str], *, stacklevel: int) -> None:
    """Warn, naming them, that tensors which were written `is_unusable`."""
    if names:
        warnings.warn(
            f"values that are NaN, infinite or 2**64 and more in tensors {shown_names(names)}, written as they are: "
            "requests that meet them end in an error, or their tokens are wrong; copy the checkpoint again from its "
            "source",
            stacklevel=stacklevel,
        )


def _header(specs: Mapping[str, TensorSpec], format_name: str) -> bytes:
    """Return the length-prefixed header of a safetensors file that holds the tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": format_name}}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": CODE_OF_DTYPE[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
