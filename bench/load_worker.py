"""A process that loads one checkpoint, or reads its files: a fresh one each time, so that its memory is its own."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.ceilings import num_cores
from bench.worker import peak_memory_bytes, serve
from converters import load as load_checkpoint

PIECE_BYTES = 8 * 2**20
RESET_PEAK = Path("/proc/self/clear_refs")


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold its weights."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 2**16)


def pieces(folder: str) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes) of all that is to be read."""
    for path in weight_files(Path(folder)):
        size = path.stat().st_size
        for offset in range(0, size, PIECE_BYTES):
            yield path, offset, min(PIECE_BYTES, size - offset)


def read(folder: str, num_threads: int, is_memory_used_before: bool) -> dict[str, float]:
    """Seconds in which `read()` brings the files into memory that holds them all, by so many threads."""
    jobs = list(pieces(folder))
    ends = np.cumsum([size for _, _, size in jobs])
    handles = {path: path.open("rb", buffering=0) for path, _, _ in jobs}
    by_thread: list[list[tuple[int, int]]] = [[] for _ in range(num_threads)]
    for index, end in enumerate(ends.tolist()):
        by_thread[index % num_threads].append((index, end))
    start = time.perf_counter()
    memory = np.empty(int(ends[-1]), np.uint8)
    if is_memory_used_before:
        memory.fill(1)
        start = time.perf_counter()

    def work(mine: list[tuple[int, int]]) -> None:
        for index, end in mine:
            path, offset, size = jobs[index]
            view = memoryview(memory[end - size : end])
            while view:
                count = os_read(handles[path].fileno(), view, offset)
                view, offset = view[count:], offset + count

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, by_thread))
    return {"seconds": time.perf_counter() - start, "num_bytes": int(ends[-1])}


def os_read(descriptor: int, view: memoryview, offset: int) -> int:
    """Read into the view; how many bytes."""
    count = os.preadv(descriptor, [view], offset)
    if not count:
        raise EOFError("a file became shorter while it was read")
    return count


def load(folder: str, dtype: str | None) -> dict[str, float | str]:
    """Load the checkpoint onto the default device: seconds until all of it is there, and the memory it took."""
    jax.block_until_ready(jnp.zeros(8) + 1)  # the device is up
    before = resident_bytes()
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")
    start = time.perf_counter()
    config, model = load_checkpoint(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    device = jax.devices()[0]
    return {
        "seconds": seconds, "peak_bytes": peak_memory_bytes() - before, "dtype": config.dtype,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
        "device": f"{device.platform} {device.device_kind}",
    }  # fmt: skip


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def main() -> None:
    serve(
        {"read": read, "load": load, "cores": num_cores}, {"jax": jax.__version__, "numpy": np.__version__}
    )


if __name__ == "__main__":
    main()
