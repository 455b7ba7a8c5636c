"""Sizes and arrays brought up to what a device's registers or instructions take at a time."""

from typing import Any


def round_up(number: int, multiple: int) -> int:
    """The next multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def pad_to(array: Any, axis: int, size: int, numpy: Any) -> Any:
    """`array` with zeros at the end of `axis`; `numpy` is numpy or jax.numpy."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return numpy.pad(array, padding) if any(padding[axis]) else array
