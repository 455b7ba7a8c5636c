"""The compiled CPU kernel: there where a compiler is, absent without harm otherwise, right on any processor."""

import platform
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import AttentionCase, explain, paged_attention, pick
from pallas_kernels.cases import CASES, HEAD_SHAPES, MIXED, BatchCase, HeadShape, make_batch
from pallas_kernels.paged_attention import native_cpu

CASE = AttentionCase(platform="cpu", num_kv_heads=4, head_dim=8, block_size=16, dtype="float32")

needs_compiler = pytest.mark.skipif(native_cpu.find_compiler() is None, reason="no C++ compiler is installed")


def attend(batch, **options):
    output, _ = jax.jit(partial(paged_attention, **batch.options, **options))(
        batch.query, batch.key, batch.value, batch.kv, batch.metadata
    )
    return np.asarray(output.astype(jnp.float32))


@needs_compiler
def test_it_is_picked_on_a_cpu():
    assert native_cpu.why_unavailable() is None
    assert pick(CASE).name == "native_cpu"


def test_without_a_compiler_xla_serves_and_the_reason_is_told(monkeypatch):
    batch = make_batch(BatchCase(name="", heads=HEAD_SHAPES["stories260k"], sequences=MIXED), "xla")
    expected = attend(batch, implementation="xla")
    monkeypatch.setattr(native_cpu, "COMPILERS", ("no-such-compiler",))
    native_cpu.why_unavailable.cache_clear()
    try:
        assert pick(CASE).name == "xla"
        assert "needs a C++ compiler (no-such-compiler), and none is installed" in explain(CASE)
        np.testing.assert_array_equal(attend(batch), expected)  # the cache has the same layout
        with pytest.raises(ValueError, match="native_cpu: needs a C"):
            attend(batch, implementation="native_cpu")
    finally:
        monkeypatch.undo()
        native_cpu.why_unavailable.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_is_a_reason_too(monkeypatch, tmp_path):
    monkeypatch.setattr(native_cpu, "SOURCE", tmp_path / "broken.cc")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "broken.cc").write_text("this is no C++")
    native_cpu.why_unavailable.cache_clear()
    try:
        reason = native_cpu.why_unavailable()
        assert reason is not None
        assert reason.startswith("could not be compiled with ")
        assert "error" in reason
        assert not list((tmp_path / ".cache" / "pallas_kernels").iterdir()), "nothing half-made stays behind"
    finally:
        monkeypatch.undo()
        native_cpu.why_unavailable.cache_clear()


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86-64")
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_every_case_is_right_when_compiled_for_an_older_processor(monkeypatch, tmp_path, machine):
    compiler = native_cpu.find_compiler()
    assert compiler is not None
    assert native_cpu.why_unavailable() is None  # what is there under its own name stays
    native_cpu.build(compiler, tmp_path / "older.so", [f"-march={machine}"])
    native_cpu.register(tmp_path / "older.so", f"{machine}.")
    monkeypatch.setattr(native_cpu, "PREFIX", f"{machine}.")
    for case in CASES:
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
