"""How each attention implementation is run on this machine: as it is, or in an interpreter of its own device.

`TARGETS` is what tests of the op loop over. TPU kernels run natively on a TPU; elsewhere jax's TPU interpreter runs
them, with its memory poisoned by NaN, its bounds checked and its races detected. Hopper kernels run natively on a GPU,
elsewhere in jax's GPU interpreter. Triton kernels run natively on a GPU, elsewhere as the plain XLA that Pallas makes
of a kernel, one program after the other.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import IMPLEMENTATIONS, KVLayout, lowering_for, paged_attention
from pallas_kernels.cases import Batch, BatchCase, make_batch, with_options
from pallas_kernels.paged_attention import mosaic_gpu, triton_gpu
from pallas_kernels.paged_attention.triton_gpu_kernel import Launch


@contextlib.contextmanager
def tpu_interpreter(dma_execution_mode: str = "on_wait") -> Iterator[None]:
    """A context in which programs are made for a TPU and its kernels are interpreted; a race raises AssertionError.

    What was started in it must be ready before it ends. "on_wait" copies when somebody waits for the copy, "eager"
    when it is started.
    """
    printed = io.StringIO()
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)
    pltpu.reset_tpu_interpret_mode_state()
    with (
        contextlib.redirect_stdout(printed),  # jax 0.10.2 tells of a race here and goes on; jax 0.12 raises
        lowering_for("tpu", "TPU v5 lite"),
        pltpu.force_tpu_interpret_mode(params),
    ):
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


@contextlib.contextmanager
def gpu_interpreter(**sizes: int) -> Iterator[None]:
    """A context in which programs are made for an H200 and its kernels are interpreted; a race raises.

    They are cut as for a device of 3 multiprocessors, so that small cases have several pieces for each; `sizes` are
    other fields of the launch.
    """
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax's GPU interpreter runs these kernels from jax 0.11 on")
    launch = mosaic_gpu.Launch(
        num_multiprocessors=3, decode_programs=16, min_item_chunks=1, is_interpreted=True, **sizes
    )
    with (
        warnings.catch_warnings(),
        mock.patch.object(mosaic_gpu, "attend", partial(mosaic_gpu.attend, launch=launch)),
        lowering_for("gpu", "NVIDIA H200"),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        # the interpreter multiplies in numpy, which warns of the infinite keys that a test brings
        warnings.filterwarnings("ignore", "invalid value encountered in matmul")
        yield


@contextlib.contextmanager
def triton_interpreter(decode_programs: int = 16, **sizes: int) -> Iterator[None]:
    """A context in which programs are made for an H200 and Triton kernels are interpreted: what they make is NaN first.

    Decodes are cut for few programs, so that small cases have several items for each; `sizes` are other fields of the
    launch.
    """
    launch = Launch(is_interpreted=True, decode_programs=decode_programs, min_item_chunks=1, **sizes)
    with (
        mock.patch.object(triton_gpu, "attend", partial(triton_gpu.attend, launch=launch)),
        lowering_for("gpu", "NVIDIA H200"),
    ):
        yield


@contextlib.contextmanager
def triton_natively() -> Iterator[None]:
    """A context in which that Pallas has deprecated Triton is no error: the row's summary says it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        yield


@dataclass(frozen=True)
class Target:
    """An implementation and the context to run it in."""

    name: str
    """Of its row in IMPLEMENTATIONS."""
    running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    block_multiple: int = 1
    """Its block sizes are multiples of this."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of keys and values that it keeps; the first is what tests of any dtype use."""

    def __str__(self) -> str:
        return self.name


INTERPRETERS = {
    "tpu": {"mosaic_tpu": tpu_interpreter},
    "gpu": {"mosaic_gpu": gpu_interpreter, "triton_gpu": triton_interpreter},
}
INTERPRETED = {
    name: interpreter
    for platform, interpreters in INTERPRETERS.items()
    if platform != jax.default_backend()
    for name, interpreter in interpreters.items()
}
BLOCK_MULTIPLES = {"mosaic_tpu": 8, "mosaic_gpu": 8}
TOLERANCES = {"float32": 5e-6, "bfloat16": 1e-2, "float8_e4m3fn": 1e-2, "int8": 1e-2}
"""float32 sums in another order; bfloat16 rounds the output to 8 bits. Quantized caches hold the same numbers in every
implementation, and their cases have bfloat16 inputs, if no others are asked for."""
RUNNING = {"triton_gpu": triton_natively, **INTERPRETED}
TARGETS = tuple(
    Target(row.name, RUNNING.get(row.name, contextlib.nullcontext), BLOCK_MULTIPLES.get(row.name, 1), row.dtypes)
    for row in IMPLEMENTATIONS
)


def _layout(case: BatchCase, name: str) -> KVLayout:
    return KVLayout(
        num_kv_heads=case.heads.num_kv_heads,
        head_dim=case.heads.head_dim,
        block_size=case.block_size,
        dtype=case.dtype,
        implementation=name,
    )


def _run(batch: Batch, implementation: str) -> tuple[np.ndarray, object]:
    attend = jax.jit(partial(paged_attention, **batch.options, implementation=implementation))
    output, kv = attend(batch.query, batch.key, batch.value, batch.kv, batch.metadata)
    return np.asarray(output.astype(jnp.float32)), jax.tree.map(np.asarray, kv)


def check_equals_the_reference(case: BatchCase, target: Target) -> None:
    """The target's output and cache are those of the reference; blocks that must not be read are NaN."""
    if case.dtype not in target.dtypes:
        case = with_options(case, dtype=target.dtypes[0])
    with target.running():
        batch = make_batch(case, target.name)
        output, kv = _run(batch, target.name)
        keys, values = _layout(case, target.name).unpack(kv)
    expected, expected_kv = _run(make_batch(case, "reference"), "reference")
    assert np.isfinite(expected[: batch.num_tokens]).all()
    assert not output[batch.num_tokens :].any(), "rows of padding tokens must be 0"
    tolerance = TOLERANCES[case.input_dtype or case.dtype]
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance)
    expected_keys, expected_values = _layout(case, "reference").unpack(expected_kv)
    # block 0 is the null block: any padding row may be the one that stays there
    np.testing.assert_array_equal(keys[1:].astype(np.float32), expected_keys[1:].astype(np.float32))
    np.testing.assert_array_equal(values[1:].astype(np.float32), expected_values[1:].astype(np.float32))
