"""C++ kernels are there where a compiler is; where one is not, or fails, what uses them falls back and says why."""

import functools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.cli import main
from pallas_kernels import AttentionCase, explain, linear, linear_misfit, native_library, pick
from pallas_kernels.linear.linear import LIBRARY
from pallas_kernels.native_library import NativeLibrary

SOURCE = """
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error Answer(xla::ffi::ResultBuffer<xla::ffi::F32> result) {
  result->typed_data()[0] = 42;
  return xla::ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(answer, Answer, xla::ffi::Ffi::Bind().Ret<xla::ffi::Buffer<xla::ffi::F32>>());
"""
"""A kernel that is soon compiled."""
LOAD = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from pallas_kernels.native_library import NativeLibrary
library = NativeLibrary(Path(sys.argv[1]), ("answer",))
print(library.why_unavailable(), jax.ffi.ffi_call(library.target("answer"), jax.ShapeDtypeStruct((), jnp.float32))())
"""
DAMAGES = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "of the right size": lambda whole: whole[:4096] + bytes(len(whole) - 4096),
}
CASE = AttentionCase(platform="cpu", num_kv_heads=4, head_dim=8, block_size=16, dtype="float32")

needs_compiler = pytest.mark.skipif(native_library.find_compiler() is None, reason="no C++ compiler is installed")


@pytest.fixture
def forgotten(monkeypatch, tmp_path):
    """Nothing is known to be available, and the user's home is empty; afterwards all is as it was."""
    fresh = functools.cache(native_library._why_unavailable.__wrapped__)
    monkeypatch.setattr(native_library, "_why_unavailable", fresh)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


@pytest.fixture
def library(request, tmp_path, forgotten):
    """The kernel that is soon compiled, under names that no other test has made known to XLA."""
    (tmp_path / "kernel").mkdir()
    source = tmp_path / "kernel" / "answer.cc"
    source.write_text(SOURCE)
    return NativeLibrary(source, ("answer",), prefix=f"{request.node.name}.")


def answer_of(library):
    return jax.ffi.ffi_call(library.target("answer"), jax.ShapeDtypeStruct((), jnp.float32))()


def kept_in(home):
    return sorted((home / ".cache" / "pallas_kernels").iterdir())


def failing_compiler(folder, said):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(said)} >&2\nexit 3\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_xla_serves_and_the_reason_is_told_when_asked_for(monkeypatch, forgotten, caplog, capsys):
    monkeypatch.setattr(native_library, "COMPILERS", ("no-such-compiler",))
    reason = "needs a C++ compiler (no-such-compiler), and none is installed"
    assert pick(CASE).name == "xla"
    assert reason in explain(CASE)
    assert linear_misfit("native_cpu", "float32") == reason
    inputs, kernel = jnp.ones((2, 3)), jnp.ones((5, 3))
    np.testing.assert_array_equal(linear(inputs, kernel), np.full((2, 5), 3.0))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .*: use implementation='xla'"):
        linear(inputs, kernel, implementation="native_cpu")
    assert not caplog.messages, "no compiler is no defect"
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert f"native_cpu   no: {reason}" in told
    assert f"linear layers on CPU: xla (native_cpu {reason})" in told


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_compiled_again(library, tmp_path, damage):
    assert library.why_unavailable() is None
    (path,) = kept_in(tmp_path)
    whole = path.read_bytes()
    path.unlink()  # what this process has loaded stays whole
    path.write_bytes(damage(whole))
    # another process, as this one would be given what it has loaded before
    told = subprocess.run(
        [sys.executable, "-c", LOAD, library.source], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (told.returncode, told.stdout) == (0, "None 42.0\n"), told.stderr
    (path,) = kept_in(tmp_path)
    assert len(path.read_bytes()) == len(whole)


@needs_compiler
def test_a_whole_library_is_not_compiled_again(library, monkeypatch):
    assert library.why_unavailable() is None
    monkeypatch.setattr(native_library, "build", None)
    again = replace(library, prefix=f"again.{library.prefix}")
    assert again.why_unavailable() is None
    assert answer_of(again) == 42.0


@needs_compiler
def test_two_that_compile_at_once_do_not_disturb_each_other(library, monkeypatch, tmp_path):
    build, other = native_library.build, replace(library, prefix=f"other.{library.prefix}")

    def build_while_another_does(*arguments):
        monkeypatch.setattr(native_library, "build", build)
        assert other.why_unavailable() is None
        build(*arguments)

    monkeypatch.setattr(native_library, "build", build_while_another_does)
    assert library.why_unavailable() is None
    assert answer_of(library) == answer_of(other) == 42.0
    assert all(native_library.find_kept(path.stem.rpartition("-")[0]) for path in kept_in(tmp_path))


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(library, monkeypatch, tmp_path, caplog, obstacle):
    def home():
        if obstacle == "no home":
            raise RuntimeError("Could not determine home directory.")
        return library.source

    monkeypatch.setattr(Path, "home", home)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    assert library.why_unavailable() is None
    assert library.why_unavailable() is None
    assert answer_of(library) == 42.0
    (message,) = caplog.messages
    assert "compiling the CPU kernel of kernel, for this process alone, as it cannot be kept: " in message
    assert ("Could not determine home" if obstacle == "no home" else str(library.source)) in message
    assert not list((tmp_path / "scratch").iterdir())


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing_behind(tmp_path, forgotten):
    source = tmp_path / "broken.cc"
    source.write_text("this is no C++")
    with pytest.warns(UserWarning, match="could not be compiled with .* error: .* takes its place, which is slower"):
        reason = NativeLibrary(source, LIBRARY.symbols).why_unavailable()
    assert reason is not None
    assert reason.startswith("could not be compiled with ")
    assert "error" in reason
    assert not kept_in(tmp_path), "nothing half-made stays behind"


def test_a_compiler_that_fails_is_warned_of_once_in_its_own_words(monkeypatch, tmp_path, forgotten):
    compiler = failing_compiler(tmp_path, "one\ntwo\nno space left\n\n  giving up\n")
    monkeypatch.setattr(native_library, "COMPILERS", (compiler,))
    reason = f"could not be compiled with {compiler} and loaded: one | two | no space left | giving up"
    message = re.escape(f"{reason}; until it can be, plain XLA takes its place, which is slower")
    with pytest.warns(UserWarning, match=f"the CPU kernel of paged_attention {message}"):
        assert pick(CASE).name == "xla"
    with pytest.warns(UserWarning, match=f"the CPU kernel of linear {message}"):
        assert linear_misfit("native_cpu", "float32") == reason
    # from here on a warning would be an error
    assert pick(CASE).name == "xla"
    assert reason in explain(CASE)
    np.testing.assert_array_equal(linear(jnp.ones((2, 3)), jnp.ones((5, 3))), np.full((2, 5), 3.0))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a.h:1: fatal error: no such file\n1 | #include\n  | ^\ncompilation terminated.\n",
         "a.h:1: fatal error: no such file | 1 | #include | | ^ | compilation terminated."),
        ("error: first\na\nerror: second\nb\nc\nd\n", "error: first | error: second | b | c | d"),
        ("", "exit status 3"),
    ],
    ids=["no header", "many errors", "silent"],
)  # fmt: skip
def test_of_a_compiler_that_fails_the_first_error_and_the_last_lines_are_told(tmp_path, said, told):
    compiler = failing_compiler(tmp_path, said)
    with pytest.raises(RuntimeError) as raised:
        native_library.build(tmp_path / "source.cc", compiler, tmp_path / "target.so")
    assert str(raised.value) == told
