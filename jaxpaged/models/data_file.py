"""Files of weights: their bytes, read by several threads into memory that arrays on a CPU device can share."""

import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

ALIGNMENT = 64
"""Bytes. An array that starts at a multiple is taken by a CPU device as it is; others are copied."""
HUGE_PAGE_BYTES = 2 * 2**20
"""Memory that begins at a multiple is given by Linux in pages of this size, which costs far less time than in small
ones; larger sizes elsewhere, or none, only make it no better than it was."""
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 2**20, 8 * 2**20
"""What one thread reads at a time."""


def num_readers() -> int:
    """Threads that read: the cores this process may use, and no more than keep any memory busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def aligned_bytes(num_bytes: int) -> np.ndarray:
    """Return fresh memory that a CPU device can use in place, in huge pages as far as it fills them."""
    alignment = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else ALIGNMENT
    memory = np.empty(num_bytes + alignment, np.uint8)  # numpy asks for huge pages from 4 MiB on
    start = -memory.ctypes.data % alignment
    return memory[start : start + num_bytes]


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the array in the element type: itself if it has it, else a new one in such memory."""
    return array if array.dtype == dtype else aligned_copy(array, dtype)


def aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a copy of the array, in C order and in such memory."""
    copy = aligned_empty(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an array of such memory, with nothing in it yet."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return aligned_bytes(num_bytes).view(dtype).reshape(tuple(shape))


class DataFile:
    """One open file. It is the file that was opened, even if another takes its name meanwhile."""

    def __init__(self, path: Path, readers: Executor, num_readers: int) -> None:
        """Open the file; `readers` runs the reading, `num_readers` jobs at a time."""
        self._file = path.open("rb", buffering=0)
        self._readers = readers
        self._num_readers = num_readers
        self._lock = threading.Lock()
        self._mapped: np.ndarray | None = None

    def close(self) -> None:
        """Close the file; what `mapped` gave stays readable."""
        self._mapped = None
        self._file.close()

    def read(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the bytes from start to stop of each span, one span after another; EOFError where the file ends."""
        return self.begin(spans)()

    def begin(self, spans: Sequence[tuple[int, int]]) -> Callable[[], np.ndarray]:
        """Begin to read these spans; what is returned waits for their end and gives what `read` gives."""
        num_bytes = sum(stop - start for start, stop in spans)
        memory = aligned_bytes(num_bytes)
        share = -(-num_bytes // self._num_readers)
        piece_bytes = min(max(share, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)
        jobs, place = [], 0
        for start, stop in spans:
            for offset in range(start, stop, piece_bytes):
                size = min(piece_bytes, stop - offset)
                jobs.append(self._readers.submit(self._read_piece, offset, memory[place : place + size]))
                place += size

        def finish() -> np.ndarray:
            for job in jobs:
                job.result()
            return memory

        return finish

    def _read_piece(self, offset: int, piece: np.ndarray) -> None:
        view = memoryview(piece)
        while view:
            if os.name == "posix":
                count = os.preadv(self._file.fileno(), [view], offset)
            else:
                with self._lock:  # one position for all threads
                    self._file.seek(offset)
                    count = self._file.readinto(view) or 0
            if not count:
                raise EOFError(f"the file ends at byte {offset}")
            view, offset = view[count:], offset + count

    def mapped(self) -> np.ndarray:
        """Return the whole file as bytes that are read where and when they are looked at.

        For short use: where the file is cut short meanwhile, looking there ends the process.
        """
        if self._mapped is None:
            self._mapped = np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return self._mapped
