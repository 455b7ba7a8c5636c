"""What stands at the doors of this package: an argument of the wrong kind is a ValueError with its name and value."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def check_count(name: str, value: Any, least: int = 1) -> None:
    """A whole number from `least` on: an int, or one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")


def is_number(value: Any) -> bool:
    """Whether `value` is one number: of Python, numpy or jax."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    return dtype is not None and getattr(value, "ndim", None) == 0 and jnp.issubdtype(dtype, jnp.number)


def check_floats(name: str, array: Any, axes: str) -> None:
    """An array of floating-point numbers with so many `axes`, which stand in their words."""
    dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", None)
    if dtype is None or shape is None:
        raise ValueError(f"{name} is a {type(array).__name__}: it must be an array [{axes}] of floating-point numbers")
    if not jnp.issubdtype(dtype, jnp.floating) or len(shape) != len(axes.split()):
        raise ValueError(f"{name} is {dtype}{shape}: it must be [{axes}] and of floating-point numbers")


def check_ids(name: str, ids: Any) -> None:
    """An int32 array of one axis."""
    dtype, shape = getattr(ids, "dtype", None), getattr(ids, "shape", None)
    if dtype != jnp.int32 or shape is None or len(shape) != 1:
        found = f"a {type(ids).__name__}" if dtype is None else f"{dtype}{shape}"
        raise ValueError(f"{name} is {found}: it must be an int32 array of one axis")


def dtype_name(dtype: Any) -> str:
    """The name of a dtype that is given by name or as such."""
    try:
        if dtype is not None:  # which numpy takes for float64
            return jnp.dtype(dtype).name
    except TypeError:
        pass
    raise ValueError(f"dtype={dtype!r} is no dtype: float32, bfloat16, int8 and float8_e4m3fn are some")
