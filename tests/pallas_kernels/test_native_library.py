"""C++ kernels are there where a compiler is; where one is not, or fails, what uses them falls back and says why."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import AttentionCase, explain, linear, linear_misfit, native_library, pick
from pallas_kernels.linear.linear import LIBRARY

CASE = AttentionCase(platform="cpu", num_kv_heads=4, head_dim=8, block_size=16, dtype="float32")


@pytest.fixture
def forgotten(monkeypatch, tmp_path):
    """Nothing is known to be available, and the user's home is empty; afterwards all is as it was."""
    fresh = functools.cache(native_library._why_unavailable.__wrapped__)
    monkeypatch.setattr(native_library, "_why_unavailable", fresh)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def test_without_a_compiler_xla_serves_and_the_reason_is_told(monkeypatch, forgotten):
    monkeypatch.setattr(native_library, "COMPILERS", ("no-such-compiler",))
    reason = "needs a C++ compiler (no-such-compiler), and none is installed"
    assert pick(CASE).name == "xla"
    assert reason in explain(CASE)
    assert linear_misfit("native_cpu", "float32") == reason
    inputs, kernel = jnp.ones((2, 3)), jnp.ones((5, 3))
    np.testing.assert_array_equal(linear(inputs, kernel), np.full((2, 5), 3.0))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .*: use implementation='xla'"):
        linear(inputs, kernel, implementation="native_cpu")


@pytest.mark.skipif(native_library.find_compiler() is None, reason="no C++ compiler is installed")
def test_a_compiler_that_fails_is_a_reason_too(tmp_path, forgotten):
    source = tmp_path / "broken.cc"
    source.write_text("this is no C++")
    reason = native_library.NativeLibrary(source, LIBRARY.symbols).why_unavailable()
    assert reason is not None
    assert reason.startswith("could not be compiled with ")
    assert "error" in reason
    assert not list((tmp_path / ".cache" / "pallas_kernels").iterdir()), "nothing half-made stays behind"
