"""The compiled CPU attention: picked where a compiler is, right on any processor."""

import platform
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import AttentionCase, native_library, paged_attention, pick
from pallas_kernels.cases import CASES, MIXED, BatchCase, HeadShape, make_batch
from pallas_kernels.paged_attention import native_cpu
from pallas_kernels.paged_attention.quantization import is_quantized

CASE = AttentionCase(platform="cpu", num_kv_heads=4, head_dim=8, block_size=16, dtype="float32")

needs_compiler = pytest.mark.skipif(native_library.find_compiler() is None, reason="no C++ compiler is installed")


def attend(batch, **options):
    output, _ = jax.jit(partial(paged_attention, **batch.options, **options))(
        batch.query, batch.key, batch.value, batch.kv, batch.metadata
    )
    return np.asarray(output.astype(jnp.float32))


@needs_compiler
def test_it_is_picked_on_a_cpu():
    assert native_cpu.LIBRARY.why_unavailable() is None
    assert pick(CASE).name == "native_cpu"


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_every_case_is_right_when_compiled_for_an_older_processor(monkeypatch, tmp_path, machine):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(native_library, "MACHINE_FLAGS", (f"-march={machine}",))
    monkeypatch.setattr(native_cpu, "LIBRARY", replace(native_cpu.LIBRARY, prefix=f"{machine}."))
    served = [case for case in CASES if not is_quantized(case.dtype)]  # bytes are xla's on a CPU
    assert len(served) > 12
    for case in served:
        batch = make_batch(case, "native_cpu")
        expected = attend(make_batch(case, "reference"), implementation="reference")
        tolerance = 5e-6 if case.dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            attend(batch, implementation="native_cpu"), expected, rtol=tolerance, atol=tolerance, err_msg=case.name
        )


@needs_compiler
@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("head_dim", [1, 20, 48, 64, 80, 256])
def test_every_block_size_and_head_dim(block_size, head_dim):
    heads = HeadShape(num_q_heads=6, num_kv_heads=2, head_dim=head_dim)
    chunk = max(64, block_size)
    case = BatchCase(
        name="", heads=heads, sequences=MIXED, block_size=block_size, window=9, key_chunk_tokens=chunk
    )
    expected = attend(make_batch(case, "reference"), implementation="reference")
    np.testing.assert_allclose(
        attend(make_batch(case, "native_cpu"), implementation="native_cpu"), expected, rtol=5e-6, atol=5e-6
    )
