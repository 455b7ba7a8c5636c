"""One small case through an implementation and through the reference, on the device at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import MIXED, BatchCase, HeadShape, make_batch
from pallas_kernels.paged_attention.api import paged_attention

TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2, "float8_e4m3fn": 2e-2, "int8": 2e-2}
"""Of an output around 1: a matrix unit rounds, a wrong kernel is off by far more."""


@functools.cache
def self_check(
    implementation: str, *, num_q_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> str | None:
    """Why `implementation` is not to be trusted here for such heads and blocks, or None where it gave what it should.

    The case has decodes and tiles, padding and NaN in whatever must not be read. Never raises: what the
    implementation raises is the reason.
    """
    case = BatchCase(
        name="self check",
        heads=HeadShape(num_q_heads, num_kv_heads, head_dim),
        sequences=MIXED,
        block_size=block_size,
        dtype=dtype,
        key_chunk_tokens=max(128, block_size),
    )
    try:
        given, expected = (_outputs(case, name) for name in (implementation, "reference"))
    except Exception as error:  # a kernel that does not compile or run raises whatever its compiler does
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    difference = float(np.abs(given - expected).max())
    if difference <= TOLERANCES[dtype]:
        return None
    return f"its output differs from the reference's by {difference:.3g}"


def _outputs(case: BatchCase, implementation: str) -> np.ndarray:
    batch = make_batch(case, implementation)
    attend = jax.jit(functools.partial(paged_attention, **batch.options, implementation=implementation))
    with jax.default_matmul_precision("highest"):
        output, _ = attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)
    return np.asarray(output.astype(jnp.float32))
