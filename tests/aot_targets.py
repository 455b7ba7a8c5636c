"""Devices that are not here and can be compiled for, and what is compiled there: the cache of an 8B Llama."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import pytest

from pallas_kernels import KVLayout, lowering_for
from pallas_kernels.aot import compile_for_h200, compile_for_tpu, missing_for_h200, missing_for_tpu

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no host to be asked for its topology
NUM_BLOCKS = 4096


@dataclass(frozen=True)
class Device:
    """A device that is compiled for."""

    name: str
    platform: str
    kind: str
    """jax's name of it."""
    compile_for: Callable[..., jax.stages.Compiled]
    """(function, *shapes, donate=...) -> its program."""
    missing: str | None
    """What has to be installed before; None when nothing is."""

    def skip_if_missing(self) -> None:
        if self.missing is not None:
            pytest.skip(self.missing)


def _tpu(name: str, kind: str) -> Device:
    return Device(name, "tpu", kind, partial(compile_for_tpu, topology=f"{name}:2x2"), missing_for_tpu())


V5E, V6E = _tpu("v5e", "TPU v5 lite"), _tpu("v6e", "TPU v6 lite")
H200 = Device("H200", "gpu", "NVIDIA H200", compile_for_h200, missing_for_h200())
DEVICES = (H200, V5E, V6E)


def name_of(value: object) -> str:
    """The id of a test's parameter."""
    return value.name if isinstance(value, Device) else str(value)


def cache_of_8b_llama(device: Device, num_layers: int) -> tuple[Any, ...]:
    """Shapes of the layer caches, as `device` stores them: NUM_BLOCKS blocks of 16 tokens, 8 heads of 128."""
    with lowering_for(device.platform, device.kind):
        layout = KVLayout(num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
        layer = jax.eval_shape(lambda: layout.init(num_blocks=NUM_BLOCKS))
    return (layer,) * num_layers


def num_bytes(tree: Any) -> int:
    """Of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def made_like(cache: jax.ShapeDtypeStruct, text: str) -> list[str]:
    """The instructions of a compiled TPU program that make an array of a layer cache's shape, or of its kernel's view.

    The view is that of mosaic_tpu_write.py.
    """
    *leading, block_size, num_lanes = cache.shape
    num_blocks, num_parts = (*leading, 1)[:2]
    view = (num_blocks, num_parts, block_size // 8, num_lanes // 128, 8, 1, 128)
    shapes = "|".join(",".join(map(str, shape)) for shape in (cache.shape, view))
    return re.findall(rf" = \(?\w+\[(?:{shapes})\]\S* ([\w-]+)\(", text)
