"""inputs @ kernel.T in float32 sums: by XLA, or on CPUs by a compiled kernel that few rows gain from.

XLA's CPU matmuls of 2 to 64 float32 rows, which decoding is made of, run at a third of what memory and multipliers
allow (README, decision 11); `native_cpu.cc` comes near.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.native_library import NativeLibrary
from pallas_kernels.platform import target_platform

IMPLEMENTATIONS = ("native_cpu", "xla")
"""By preference."""
NATIVE_DTYPES = ("float32", "bfloat16")
SYMBOL = "linear"
SYMBOL_AT = "linear_at"
LIBRARY = NativeLibrary(Path(__file__).with_name("native_cpu.cc"), (SYMBOL, SYMBOL_AT))


def _xla(inputs: Array, kernel: Array) -> Array:
    return jax.lax.dot_general(inputs, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_jvp
def _native_cpu(inputs: Array, kernel: Array) -> Array:
    result = jax.eval_shape(_xla, inputs, kernel)  # which knows over what axes of a mesh it differs, in a shard_map
    return jax.ffi.ffi_call(LIBRARY.target(SYMBOL), result, vmap_method="sequential")(inputs, kernel)


@_native_cpu.defjvp
def _native_cpu_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    inputs, kernel = primals
    return _native_cpu(inputs, kernel), _xla(tangents[0], kernel) + _xla(inputs, tangents[1])


def _xla_at(inputs: Array, kernels: Array, index: Array) -> Array:
    nearest = jnp.clip(index, 0, kernels.shape[0] - 1)  # jax counts a negative index from the end
    return _xla(inputs, jax.lax.dynamic_index_in_dim(kernels, nearest, keepdims=False))


@jax.custom_jvp
def _native_cpu_at(inputs: Array, kernels: Array, index: Array) -> Array:
    result = jax.eval_shape(_xla_at, inputs, kernels, index)
    call = jax.ffi.ffi_call(LIBRARY.target(SYMBOL_AT), result, vmap_method="sequential")
    return call(inputs, kernels, index.reshape(1))


@_native_cpu_at.defjvp
def _native_cpu_at_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    inputs, kernels, index = primals
    tangent = _xla_at(tangents[0], kernels, index) + _xla_at(inputs, tangents[1], index)
    return _native_cpu_at(inputs, kernels, index), tangent


def linear_misfit(implementation: str, dtype: str) -> str | None:
    """Why an implementation cannot do arrays of `dtype` on the target platform, or None where it can.

    Raises ValueError for a name that is not in IMPLEMENTATIONS.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return None
    if target_platform() != "cpu":
        return f"runs on cpu only, and this is {target_platform()}"
    if dtype not in NATIVE_DTYPES:
        return f"is for {' and '.join(NATIVE_DTYPES)}, and these are {dtype}"
    return LIBRARY.why_unavailable()


def linear(
    inputs: Float[Array, "rows in_dim"], kernel: Float[Array, "out_dim in_dim"], *, implementation: str | None = None
) -> Float[Array, "rows out_dim"]:
    """Return `inputs @ kernel.T` in float32, by the first of IMPLEMENTATIONS that fits, or by the one that is named.

    Differentiable in both. Arrays that are split over devices are brought together under `jit`, as XLA cannot split the
    compiled kernel: shard it with `shard_map`, or ask for implementation="xla". Raises ValueError for
    two dtypes, unequal in_dim, and an implementation that does not fit.
    """
    if inputs.dtype != kernel.dtype:
        raise ValueError(f"inputs are {inputs.dtype} and the kernel is {kernel.dtype}: cast one of them")
    if inputs.ndim != 2 or kernel.ndim != 2 or inputs.shape[1] != kernel.shape[1]:
        raise ValueError(
            f"inputs {inputs.shape} and kernel {kernel.shape} do not fit: [rows, in_dim] and [out_dim, in_dim] do"
        )
    dtype = str(inputs.dtype)
    if implementation is None:
        implementation = next(name for name in IMPLEMENTATIONS if linear_misfit(name, dtype) is None)
    elif (reason := linear_misfit(implementation, dtype)) is not None:
        raise ValueError(f"{implementation} {reason}: use implementation='xla'")
    return _native_cpu(inputs, kernel) if implementation == "native_cpu" else _xla(inputs, kernel)


def linear_at(
    inputs: Float[Array, "rows in_dim"],
    kernels: Float[Array, "number out_dim in_dim"],
    index: Int[Array, ""],
    *,
    implementation: str | None = None,
) -> Float[Array, "rows out_dim"]:
    """Return `linear(inputs, kernels[index])`; the compiled kernel reads that one where it lies, XLA may copy it first.

    An index out of range takes the nearest. Raises ValueError as `linear` does.
    """
    index_dtype = getattr(index, "dtype", type(index).__name__)
    if inputs.dtype != kernels.dtype or index_dtype != jnp.int32:
        raise ValueError(
            f"inputs are {inputs.dtype}, kernels {kernels.dtype} and the index {index_dtype}: the first two must be "
            "equal, the index an int32 array without axes"
        )
    if inputs.ndim != 2 or kernels.ndim != 3 or inputs.shape[1] != kernels.shape[2] or index.ndim:
        raise ValueError(
            f"inputs {inputs.shape}, kernels {kernels.shape} and index {index.shape} do not fit: [rows, in_dim], "
            "[number, out_dim, in_dim] and () do"
        )
    dtype = str(inputs.dtype)
    if implementation is None:
        implementation = next(name for name in IMPLEMENTATIONS if linear_misfit(name, dtype) is None)
    elif (reason := linear_misfit(implementation, dtype)) is not None:
        raise ValueError(f"{implementation} {reason}: use implementation='xla'")
    multiply = _native_cpu_at if implementation == "native_cpu" else _xla_at
    return multiply(inputs, kernels, index)
