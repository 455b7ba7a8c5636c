"""C++ kernels for CPUs: compiled on the machine they run on, at first use, and made known to XLA (jax.ffi).

Compiled with the headers of the installed jaxlib and kept beside other caches of the user; where nothing can be kept,
compiled for the process. Without a C++ compiler the library says so when it is asked, with one that fails it warns, and
what would use it falls back to XLA.
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
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib

COMPILERS = ("g++", "clang++", "c++")
MACHINE_FLAGS = ("-march=native", "-mcpu=native", "")
"""For the processor at hand, the first that the compiler knows (clang on arm64 knows the second only)."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-w")
COMPILE_TIMEOUT_S = 300
LAST_LINES = 4
"""Of a compiler that fails: how many are told."""
HEADER = Path(__file__).with_name("native.h")
"""Included by every source."""


@dataclass(frozen=True)
class NativeLibrary:
    """One C++ source and the handlers that it defines."""

    source: Path
    symbols: tuple[str, ...]
    prefix: str = "pallas_kernels."
    """Before a symbol: the name that XLA knows the handler by."""

    @property
    def name(self) -> str:
        """What its kernels compute."""
        return self.source.parent.name

    def target(self, symbol: str) -> str:
        """The name to hand to `jax.ffi.ffi_call`."""
        return self.prefix + symbol

    def why_unavailable(self) -> str | None:
        """Why the library cannot be had here, or None once it is loaded and known to XLA.

        Compiles it if need be; a compiler that fails is a warning too, once.
        """
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
    """Write the shared library; RuntimeError with the compiler's words, in one line."""
    words = ""
    for machine in MACHINE_FLAGS:
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(target)]
        done = subprocess.run(
            [*command, *machine.split()], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line]
        # the first error is often the cause, and the last lines stand also where a compiler names no error
        words = " | ".join(dict.fromkeys(errors[:1] + lines[-LAST_LINES:])) or f"exit status {done.returncode}"
    raise RuntimeError(words)


def _named(stem: str, content: bytes) -> str:
    """The file name of a kept library. It tells what is in it, as loading a damaged one ends the process."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where compiled libraries are kept; RuntimeError where the user has no home."""
    return Path.home() / ".cache" / "pallas_kernels"


def find_kept(stem: str) -> Path | None:
    """A library that was compiled before and is whole, if there is one; damaged ones are removed."""
    candidates: list[Path] = []
    with contextlib.suppress(OSError, RuntimeError):  # there is no such folder, or none that can be read
        candidates = sorted(cache_folder().glob(f"{stem}-*.so"))
    for path in candidates:
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


def _stem(library: NativeLibrary, compiler: str) -> str:
    """How names of files begin that hold this library, for this jaxlib, compiler and processor."""
    sources = (library.source.read_bytes(), HEADER.read_bytes())
    facts = (*sources, jaxlib.__version__, compiler, *FLAGS, *MACHINE_FLAGS, platform.machine(), _cpu_flags())
    return f"{library.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def load(library: NativeLibrary, compiler: str) -> None:
    """Register the library that was kept; where there is none, compile it, and keep it if the cache can be written to.

    Raises RuntimeError, SubprocessError or OSError where it can be neither compiled nor loaded.
    """
    stem = _stem(library, compiler)
    kept = find_kept(stem)
    if kept is not None:
        register(library, kept)
        return
    folder, scope = None, "once for this machine"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError) as error:
        folder, scope = None, f"for this process alone, as it cannot be kept: {error}"
        scratch = tempfile.TemporaryDirectory()
    logging.getLogger(__name__).warning("compiling the CPU kernel of %s, %s", library.name, scope)
    with scratch:
        path = Path(scratch.name) / f"{stem}.so"
        build(library.source, compiler, path)
        if folder is not None:
            path = path.replace(folder / _named(stem, path.read_bytes()))  # whole or not at all, whoever else does it
        register(library, path)  # once it is loaded, its file is not needed


@functools.cache
def _why_unavailable(library: NativeLibrary) -> str | None:
    compiler = find_compiler()
    if compiler is None:
        return f"needs a C++ compiler ({', '.join(COMPILERS)}), and none is installed"
    try:
        load(library, compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"could not be compiled with {compiler} and loaded: {error}"
        warnings.warn(
            f"the CPU kernel of {library.name} {reason}; until it can be, plain XLA takes its place, which is slower",
            stacklevel=3,
        )
        return reason
    return None
