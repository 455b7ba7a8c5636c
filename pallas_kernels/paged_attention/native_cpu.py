"""Paged attention in C++ for CPUs, called by XLA through its foreign function interface (jax.ffi).

`native_cpu.cc` is compiled on the machine it runs on, at first use, with the headers of the installed jaxlib, and kept
beside other caches of the user. Without a C++ compiler the row says so and does not fit: XLA serves then. The cache is
stored as `xla` stores it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array
from jaxtyping import Float

from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.metadata import AttentionMetadata

SOURCE = Path(__file__).with_suffix(".cc")
COMPILERS = ("g++", "clang++", "c++")
MACHINE_FLAGS = ("-march=native", "-mcpu=native", "")
"""For the processor at hand, the first that the compiler knows (clang on arm64 knows the second only)."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-w")
COMPILE_TIMEOUT_S = 300
SYMBOLS = {jnp.dtype(jnp.float32): "paged_attention_float32", jnp.dtype(jnp.uint16): "paged_attention_bfloat16"}
"""The handler for each stored dtype of the cache."""
PREFIX = "pallas_kernels."
"""Before the symbol: the name that XLA knows a handler by."""

cache_shapes = xla.cache_shapes
pack = xla.pack
unpack = xla.unpack


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


def build(compiler: str, target: Path, machine_flags: Sequence[str] = MACHINE_FLAGS) -> None:
    """Write the shared library; RuntimeError with the compiler's first complaint."""
    complaint = ""
    for machine in machine_flags:
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(target)]
        done = subprocess.run(
            [*command, *machine.split()], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
    raise RuntimeError(complaint)


@functools.cache  # XLA takes a name once
def register(library: Path, prefix: str) -> None:
    """Load a shared library and make its handlers known to XLA. OSError if it cannot be loaded."""
    handle = ctypes.CDLL(str(library))
    for symbol in SYMBOLS.values():
        jax.ffi.register_ffi_target(prefix + symbol, jax.ffi.pycapsule(getattr(handle, symbol)), platform="cpu")


@functools.cache
def why_unavailable() -> str | None:
    """Why the library cannot be had here, or None once it is loaded and known to XLA. Compiles it if need be."""
    compiler = find_compiler()
    if compiler is None:
        return f"needs a C++ compiler ({', '.join(COMPILERS)}), and none is installed"
    facts = (SOURCE.read_bytes(), jaxlib.__version__, compiler, *FLAGS, platform.machine(), _cpu_flags())
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    try:
        folder = Path.home() / ".cache" / "pallas_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"native_cpu-{key}.so"
        if not library.is_file():
            logging.getLogger(__name__).warning("compiling the CPU attention kernel, once for this machine")
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                build(compiler, Path(scratch) / library.name)
                os.replace(Path(scratch) / library.name, library)  # whole or not at all, whoever else compiles it
        register(library, PREFIX)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"could not be compiled with {compiler}: {error}"
    return None


def attend(
    query: Float[Array, "tokens q_heads head_dim"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    kv: xla.Cache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, "q_heads"] | None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], xla.Cache]:
    """The op as `api.paged_attention` defines it."""
    if (reason := why_unavailable()) is not None:
        raise ValueError(f"native_cpu {reason}: use implementation='xla'")
    keys, values = xla.write(kv, key, value, metadata.slot_mapping)
    call = jax.ffi.ffi_call(PREFIX + SYMBOLS[keys.dtype], jax.ShapeDtypeStruct(query.shape, jnp.float32))
    output = call(
        query.astype(jnp.float32) * scale,
        keys,
        values,
        metadata.block_tables,
        metadata.context_lens,
        metadata.query_starts,
        metadata.num_decodes,
        metadata.tile_sequences,
        metadata.tile_starts,
        metadata.tile_lens,
        metadata.num_tiles,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        window=np.int64(window or 0),
        soft_cap=np.float32(soft_cap or 0.0),
    )
    return output.astype(query.dtype), (keys, values)
