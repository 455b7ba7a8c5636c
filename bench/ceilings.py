"""What this machine can do at most, measured: reading memory, and multiplying float32 matrices, with every core.

Ceilings of the host CPU; a run on another device reports no fractions of them. Run as a worker process, so that
neither its arrays nor its threads stay in the process that measures.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from bench.worker import serve

READ_BYTES = 2**30
MATMUL_SIZES = ((2048, 2048, 2048), (1024, 4096, 4096), (512, 768, 32_000))
"""(rows, inner, columns): large enough for the rate of the machine, and one as wide as a Llama head."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best_s(work: Callable[[], object], repeats: int) -> float:
    """Shortest time of `repeats` runs after one unmeasured."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measured_bandwidth(*, num_bytes: int = READ_BYTES, repeats: int = 5) -> float:
    """Bytes a second of a read-only sum over `num_bytes`, one slice a core; the best of repeats and of two dtypes."""
    cores = num_cores()
    values = np.ones(num_bytes // 8, np.float64)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for view in (values, values.view(np.int64)):
            slices = np.array_split(view, cores)
            best = max(best, num_bytes / _best_s(lambda: list(pool.map(np.sum, slices)), repeats))  # noqa: B023
    return best


def measured_matmul_rate(*, sizes: tuple[tuple[int, int, int], ...] = MATMUL_SIZES, repeats: int = 5) -> float:
    """Operations a second of the best of a few large float32 matmuls, by numpy's BLAS or by XLA."""
    rng = np.random.default_rng(0)
    multiply = jax.jit(jnp.matmul)
    best = 0.0
    for rows, inner, columns in sizes:
        left = rng.standard_normal((rows, inner), dtype=np.float32)
        right = rng.standard_normal((inner, columns), dtype=np.float32)
        flops = 2 * rows * inner * columns
        device_left, device_right = jnp.asarray(left), jnp.asarray(right)
        blas_s = _best_s(lambda: left @ right, repeats)  # noqa: B023
        xla_s = _best_s(lambda: multiply(device_left, device_right).block_until_ready(), repeats)  # noqa: B023
        best = max(best, flops / min(blas_s, xla_s))
    return best


def measure() -> dict[str, float]:
    """Both ceilings, in a few seconds."""
    return {"read_bytes_per_s": measured_bandwidth(), "matmul_flops_per_s": measured_matmul_rate()}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    serve({"measure": measure, "bandwidth": measured_bandwidth}, {"jax": jax.__version__, "numpy": np.__version__})


if __name__ == "__main__":
    main()
