"""C++ kernels for CPUs: compiled on the machine they run on, at first use, and made known to XLA (jax.ffi).

Compiled with the headers of the installed jaxlib and kept beside other caches of the user. Without a C++ compiler the
library says so, and what would use it falls back to XLA.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib

COMPILERS = ("g++", "clang++", "c++")
MACHINE_FLAGS = ("-march=native", "-mcpu=native", "")
"""For the processor at hand, the first that the compiler knows (clang on arm64 knows the second only)."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-w")
COMPILE_TIMEOUT_S = 300
HEADER = Path(__file__).with_name("native.h")
"""Included by every source."""


@dataclass(frozen=True)
class NativeLibrary:
    """One C++ source and the handlers that it defines."""

    source: Path
    symbols: tuple[str, ...]
    prefix: str = "pallas_kernels."
    """Before a symbol: the name that XLA knows the handler by."""

    def target(self, symbol: str) -> str:
        """The name to hand to `jax.ffi.ffi_call`."""
        return self.prefix + symbol

    def why_unavailable(self) -> str | None:
        """Why the library cannot be had here, or None once it is loaded and known to XLA. Compiles it if need be."""
        return _why_unavailable(self)


def _cpu_flags() -> str:
    """What tells one processor from another with other instructions: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def find_compiler() -> str | None:
    """The path of a C++ compiler, if there is one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def build(source: Path, compiler: str, target: Path) -> None:
    """Write the shared library; RuntimeError with the compiler's first complaint."""
    complaint = ""
    for machine in MACHINE_FLAGS:
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(target)]
        done = subprocess.run(
            [*command, *machine.split()], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
    raise RuntimeError(complaint)


def _named(stem: str, content: bytes) -> str:
    """The file name of a kept library. It tells what is in it, as loading a damaged one ends the process."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def find_kept(folder: Path, stem: str) -> Path | None:
    """A library that was compiled before and is whole, if there is one; damaged ones are removed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        with contextlib.suppress(OSError):  # another process may have removed it
            if path.name == _named(stem, path.read_bytes()):
                return path
            path.unlink()
    return None


@functools.cache  # XLA takes a name once
def register(library: NativeLibrary, path: Path) -> None:
    """Load a shared library and make its handlers known to XLA. OSError if it cannot be loaded."""
    handle = ctypes.CDLL(str(path))
    for symbol in library.symbols:
        capsule = jax.ffi.pycapsule(getattr(handle, symbol))
        jax.ffi.register_ffi_target(library.target(symbol), capsule, platform="cpu")


@functools.cache
def _why_unavailable(library: NativeLibrary) -> str | None:
    compiler = find_compiler()
    if compiler is None:
        return f"needs a C++ compiler ({', '.join(COMPILERS)}), and none is installed"
    sources = (library.source.read_bytes(), HEADER.read_bytes())
    facts = (*sources, jaxlib.__version__, compiler, *FLAGS, *MACHINE_FLAGS, platform.machine(), _cpu_flags())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    name = library.source.parent.name
    try:
        folder = Path.home() / ".cache" / "pallas_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{name}-{key}"
        path = find_kept(folder, stem)
        if path is None:
            logging.getLogger(__name__).warning("compiling the CPU kernel of %s, once for this machine", name)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / f"{stem}.so"
                build(library.source, compiler, built)
                path = built.replace(folder / _named(stem, built.read_bytes()))  # whole or not at all, whoever else
        register(library, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"could not be compiled with {compiler}: {error}"
    return None
