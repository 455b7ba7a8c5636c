"""How long does a paged-attention kernel take on an accelerator, and is it right there?

Decode is bound by memory bandwidth: its ceiling is every key and value in use, read once, at the copy bandwidth
measured in the same run. Prefill is bound by arithmetic: its ceiling is the causal products at the measured bfloat16
matmul rate. Small cases stay in the device's own caches, so that they may be faster than their ceiling. Right is what
is near attention in float64, for ragged batches whose other memory is NaN. Used by `kernel_agenda.py` and `tune.py`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.device_cases import DTYPE
from bench.device_layers import Layers, attend_with
from bench.float64_attention import attend_in_float64
from pallas_kernels import AttentionCase, lowering_for
from pallas_kernels.cases import BatchCase, HeadShape, make_batch, with_options
from pallas_kernels.paged_attention.tuning import Sizes

TOLERANCE = 1e-2
"""Of an output against float64, as a part of it where it is above 1: bfloat16 rounds it, and weights before, to 8
bits."""
COPY_BYTES = 2**31
MATMUL_SIZE = 8192
MIN_REPEAT_S = 0.02
"""Calls are queued until they take this long together, so that what the host needs to start and await them is little
beside it."""
MAX_CALLS = 64
NUM_QUEUED = 4
"""Likewise, of what measures a ceiling, each of which takes a millisecond or so."""
MAX_TIMING_S = 4.0
"""Of all repeats of a program: of slow ones there are fewer."""


@contextlib.contextmanager
def interpreting(name: str) -> Iterator[None]:
    """On a CPU: a context in which the Pallas kernels of another device are interpreted."""
    from jax.experimental.pallas import tpu as pltpu  # noqa: PLC0415  Pallas takes long to import

    if name == "mosaic_tpu" and jax.default_backend() == "cpu":
        with lowering_for("tpu", "TPU v5 lite"), pltpu.force_tpu_interpret_mode():
            yield
    else:
        yield


def does_device_answer() -> bool:
    """Whether programs still run: after an illegal access of a kernel none does, in the whole process."""
    try:
        return int(jax.jit(lambda number: number + 1)(jnp.int32(1))) == 2
    except Exception:  # whatever a runtime raises
        return False


def copy_bandwidth(*, num_bytes: int = COPY_BYTES, repeats: int = 8) -> float:
    """Bytes a second that the device reads and writes when it copies an array; the best of repeats."""
    add = jax.jit(lambda array: array + jnp.uint32(1))
    return 2 * num_bytes / _best_call_s(add, jnp.arange(num_bytes // 4, dtype=jnp.uint32), repeats)


def matmul_rate(*, size: int = MATMUL_SIZE, repeats: int = 8) -> float:
    """Operations a second of a square bfloat16 product with float32 sums; the best of repeats."""
    left, right = (jax.random.normal(jax.random.key(key), (size, size), jnp.bfloat16) for key in (0, 1))
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.bfloat16))
    return 2 * size**3 / _best_call_s(lambda array: multiply(array, right), left, repeats)


def _best_call_s(call: Callable[[jax.Array], jax.Array], array: jax.Array, repeats: int) -> float:
    """Seconds of a call, of which some are queued at a time; the best of repeats."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(NUM_QUEUED):
            result = call(array)
        result.block_until_ready()
        best = min(best, (time.perf_counter() - start) / NUM_QUEUED)
    return best


def attention_case(heads: HeadShape, block_size: int, dtype: str = DTYPE) -> AttentionCase:
    """The case as the rule that picks sees it."""
    return AttentionCase(
        num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, block_size=block_size, dtype=dtype,
        num_q_heads=heads.num_q_heads,
    )  # fmt: skip


def largest_error(case: BatchCase, name: str, sizes: Sizes | None = None) -> float:
    """Of an implementation against attention in float64; NaN counts as infinite. `sizes` as in `attend_with`."""
    with interpreting(name):
        batch = make_batch(case if sizes is None else with_options(case, **sizes.tiles), name)
        attend = jax.jit(partial(attend_with(name, sizes), **batch.options))
        output, _ = attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)
        found = np.asarray(output[: batch.num_tokens].astype(jnp.float32))
    truth = attend_in_float64(case)  # which does not depend on how it is cut
    errors = np.abs(found - truth) / np.maximum(np.abs(truth), 1.0)
    return float(np.nan_to_num(errors, nan=np.inf).max())


def times_ms(layers: Layers, num_layers: int, repeats: int) -> tuple[list[float], float]:
    """Milliseconds a layer in each repeat, and the seconds that compiling took. ArithmeticError for outputs that are
    not finite, as all that goes in is."""
    start = time.perf_counter()
    compiled = layers.run.lower(layers.caches, *layers.arguments).compile()
    compile_s = time.perf_counter() - start
    caches, output = compiled(layers.caches, *layers.arguments)  # the first call loads the program
    if not bool(jnp.isfinite(output).all()):
        raise ArithmeticError("its outputs are not finite")

    def queue(num_calls: int) -> float:
        nonlocal caches
        start = time.perf_counter()
        for _ in range(num_calls):
            caches, output = compiled(caches, *layers.arguments)
        output.block_until_ready()
        return time.perf_counter() - start

    once_s = queue(1)
    num_calls = calls_of_a_repeat(once_s)
    times = [once_s] if num_calls == 1 else []
    while len(times) < max(1, min(repeats, round(MAX_TIMING_S / (once_s * num_calls)))):
        times.append(queue(num_calls) / num_calls)
    return [seconds / num_layers * 1e3 for seconds in times], compile_s


def calls_of_a_repeat(once_s: float) -> int:
    """How many calls of a program that takes `once_s` are queued at a time."""
    return min(max(round(MIN_REPEAT_S / once_s), 1), MAX_CALLS)
