"""Arrays in the Zarr format, version 2, as plain files: each chunk a file of its elements, nothing compressed.

So is what `orbax.save` writes. Such files are read as safetensors are: by several threads, straight to where the
parameter will stay, several times faster than by a library that puts an array together from what it decoded.
Format: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

import itertools
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.models.data_file import MOST_PIECE_BYTES, aligned_empty, num_readers
from jaxpaged.models.read_ahead import Finish
from jaxpaged.models.tensor_files import read_json

FACTS_FILE = ".zarray"
SCATTERED_PIECE_BYTES = 2**20
"""What a thread reads at a time where rows of a chunk do not follow one another in the array: it has that beside it."""


@dataclass(frozen=True)
class PlainArray:
    """An array whose chunks are plain files."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    separator: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """Yield the file of each chunk, and where it belongs."""
        counts = [size // length for size, length in zip(self.shape, self.chunk_shape, strict=True)]
        for index in itertools.product(*map(range, counts)):
            place = tuple(
                slice(number * length, (number + 1) * length)
                for number, length in zip(index, self.chunk_shape, strict=True)
            )
            yield self.separator.join(map(str, index)), place

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def check(self) -> None:
        """Raise ValueError, naming the file, for a chunk that is not there or not as long as it must be."""
        for name, _ in self.chunks():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != self.chunk_bytes:
                state = "is not there" if found is None else f"has {found} bytes and must have {self.chunk_bytes}"
                raise ValueError(f"{path}: {state}")


def plain_array(folder: Path, dtypes: Iterable[np.dtype]) -> PlainArray | None:
    """Return the array in the folder if it is of one of these types, and plain; None if whoever wrote it must read it.

    Only its facts are read. An array with chunks that reach over its edge is not taken for plain.
    """
    if not (folder / FACTS_FILE).is_file():
        return None
    facts = read_json(folder / FACTS_FILE)
    is_plain = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}
    if any(facts.get(name, "") != value for name, value in is_plain.items()):
        return None
    dtype = next((dtype for dtype in dtypes if _code(dtype) == facts.get("dtype")), None)
    shape, chunk_shape = _lengths(facts.get("shape")), _lengths(facts.get("chunks"))
    separator = facts.get("dimension_separator", ".")
    if dtype is None or not shape or chunk_shape is None or separator not in (".", "/"):
        return None
    if len(chunk_shape) != len(shape) or any(size % part for size, part in zip(shape, chunk_shape, strict=True)):
        return None
    return PlainArray(folder, shape, dtype, chunk_shape, separator)


def _lengths(value: Any) -> tuple[int, ...] | None:
    """Return a list of positive whole numbers; None for anything else."""
    if not isinstance(value, list) or any(type(length) is not int or length < 1 for length in value):
        return None
    return tuple(value)


def _code(dtype: np.dtype) -> str:
    """Return what the facts call an element type: numpy's code, and bfloat16, which numpy has none for, by name."""
    return str(dtype) if dtype.kind == "V" else dtype.str


class PlainReader:
    """Reads plain arrays by several threads. Use it in a `with` statement."""

    def __init__(self) -> None:
        self._readers = ThreadPoolExecutor(num_readers(), "weights")
        self._scratch = threading.local()

    def __enter__(self) -> "PlainReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def begin(self, array: PlainArray) -> Finish:
        """Begin to read the array; what is returned waits for its end and gives it, aligned for a CPU device.

        ValueError, naming the file, for a chunk that cannot be read.
        """
        memory = aligned_empty(array.shape, array.dtype)
        bits: np.ndarray[Any, Any] = memory.view(f"u{array.dtype.itemsize}")  # numpy copies these without its lock
        row_bytes = array.chunk_bytes // array.chunk_shape[0]
        rows = max(1, MOST_PIECE_BYTES // row_bytes)
        jobs = []
        for name, place in array.chunks():
            path, chunk = array.folder / name, bits[place]
            jobs += [
                self._readers.submit(self._read_rows, path, first * row_bytes, chunk[first : first + rows])
                for first in range(0, len(chunk), rows)
            ]

        def finish() -> np.ndarray:
            for job in jobs:
                job.result()
            return memory

        return finish

    def _read_rows(self, path: Path, start: int, target: np.ndarray) -> None:
        """Fill the rows with what the file holds from byte `start` on."""
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(start)
                if target.flags.c_contiguous:
                    _read_into(stream, target)
                    return
                count = max(1, SCATTERED_PIECE_BYTES // target[0].nbytes)
                for first in range(0, len(target), count):
                    rows = target[first : first + count]
                    piece = self._memory(rows.nbytes).view(rows.dtype).reshape(rows.shape)
                    _read_into(stream, piece)
                    np.copyto(rows, piece)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error

    def _memory(self, num_bytes: int) -> np.ndarray:
        """Return memory of this thread, the same each time: fresh memory would cost more than reading."""
        memory = getattr(self._scratch, "memory", None)
        if memory is None or memory.size < num_bytes:
            memory = self._scratch.memory = np.empty(num_bytes, np.uint8)
        return memory[:num_bytes]


def _read_into(stream: FileIO, array: np.ndarray) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        count = stream.readinto(view)
        if not count:
            raise EOFError("it became shorter while it was read")
        view = view[count:]
