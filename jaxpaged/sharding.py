"""Tensor parallelism: which axes of a model are cut over devices, and the only place that knows the mesh.

Layers name the axes of their parameters by what they are ("q_heads", "mlp"); here stands which of those are cut. A step
runs in one `shard_map`: every device holds its heads, its part of the MLP and of the vocabulary, and runs the same
program on all tokens (Shoeybi et al. 2019, Megatron-LM, section 3). What a layer sums over a cut axis it completes with
`sum_over`; what it has a part of it completes with `gather`. On one device both do nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Num

MESH_AXIS = "tensor"
CUT_AXES = frozenset({"q_heads", "kv_heads", "mlp", "vocab", "experts"})
"""The logical axes that are cut; all others are whole on every device."""

LogicalAxes = tuple[str | None, ...]
"""One name for each axis of an array; None is whole."""


# -- inside a step


def _is_cut(axis: str | None) -> bool:
    # jax's own record of what the function being traced is mapped over: empty outside of a shard_map
    return axis in CUT_AXES and MESH_AXIS in get_abstract_mesh().manual_axes


def sum_over(partial: Num[Array, "..."], axis: str | None) -> Num[Array, "..."]:
    """The sum of what every device has found over its part of a logical axis; `partial` itself where none is cut."""
    return lax.psum(partial, MESH_AXIS) if _is_cut(axis) else partial


def mean_over(partial: Num[Array, "..."], axis: str | None) -> Num[Array, "..."]:
    """The mean of what every device has found over its part of a logical axis, all parts being equally long."""
    return lax.pmean(partial, MESH_AXIS) if _is_cut(axis) else partial


def gather(part: Num[Array, "..."], axis: str | None, *, dimension: int) -> Num[Array, "..."]:
    """All devices' parts of a logical axis side by side along `dimension`; `part` itself where none is cut."""
    return lax.all_gather(part, MESH_AXIS, axis=dimension, tiled=True) if _is_cut(axis) else part


def first_index(axis: str | None, part_size: int) -> Any:
    """Where this device's part of a logical axis begins, when every device has `part_size` of it: 0 where none is."""
    return lax.axis_index(MESH_AXIS) * part_size if _is_cut(axis) else 0


# -- around it


def make_mesh(num_devices: int, devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh of the first `num_devices` devices; None for one. Raises ValueError where there are fewer."""
    found = list(jax.devices() if devices is None else devices)
    if num_devices > len(found):
        message = f"tensor_parallel_size={num_devices}, but jax sees {len(found)} {found[0].platform} device(s): "
        message += "lower it"
        if found[0].platform == "cpu":
            message += f", or try virtual ones (XLA_FLAGS=--xla_force_host_platform_device_count={num_devices})"
        raise ValueError(message)
    if num_devices == 1:
        return None
    return Mesh(np.array(found[:num_devices]), (MESH_AXIS,), axis_types=(AxisType.Auto,))


def whole(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spec_of(axes: LogicalAxes) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh."""
    return PartitionSpec(*(MESH_AXIS if axis in CUT_AXES else None for axis in axes))


def cut_dimension(num_dimensions: int, dimension: int) -> PartitionSpec:
    """The spec of an array that is cut along one dimension."""
    return PartitionSpec(*(MESH_AXIS if i == dimension else None for i in range(num_dimensions)))


@dataclass(frozen=True)
class HeadCounts:
    """Heads of one device."""

    num_q_heads: int
    num_kv_heads: int


def cut_heads(num_q_heads: int, num_kv_heads: int, num_devices: int) -> HeadCounts:
    """Key-value heads are repeated where there are fewer than devices. Raises ValueError where heads cannot be cut."""
    if num_q_heads % num_devices:
        raise ValueError(
            f"tensor_parallel_size={num_devices} does not divide the model's {num_q_heads} query heads: use a divisor"
        )
    if num_kv_heads % num_devices and num_devices % num_kv_heads:
        raise ValueError(
            f"tensor_parallel_size={num_devices} and the model's {num_kv_heads} key-value heads: one must be a "
            "multiple of the other"
        )
    return HeadCounts(num_q_heads // num_devices, max(num_kv_heads // num_devices, 1))


@dataclass(frozen=True)
class Cut:
    """How the parameters of a model are cut into one part for each device.

    A vocabulary that the number of devices does not divide is filled up with zeros, key-value heads that are fewer than
    devices are repeated; all else must divide.
    """

    num_devices: int
    num_kv_heads: int
    axes: Mapping[str, LogicalAxes]
    """Of every parameter, by path."""

    def part_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one device's part of a parameter. Raises ValueError where it cannot be cut."""
        return tuple(
            self._part_length(path, axis, length) for axis, length in zip(self.axes[path], shape, strict=True)
        )

    def _part_length(self, path: str, axis: str | None, length: int) -> int:
        if axis not in CUT_AXES:
            return length
        if axis == "vocab":
            return -(-length // self.num_devices)
        if axis == "kv_heads" and self.num_kv_heads < self.num_devices:
            return length // self.num_kv_heads
        if length % self.num_devices:
            raise ValueError(
                f"tensor_parallel_size={self.num_devices} does not divide {path!r}, whose axis {axis!r} is {length} "
                "long: use a divisor"
            )
        return length // self.num_devices

    def whole_shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of all devices' parts of a parameter side by side: as it was, but for what is filled up or repeated."""
        return tuple(
            length * self.num_devices if axis in CUT_AXES else length
            for axis, length in zip(self.axes[path], self.part_shape(path, shape), strict=True)
        )

    def sharding(self, mesh: Mesh, path: str) -> NamedSharding:
        """How the parameter lies on a mesh of as many devices."""
        return NamedSharding(mesh, spec_of(self.axes[path]))

    def part(self, path: str, array: np.ndarray, device: int) -> np.ndarray:
        """The part of a parameter that device number `device` has: a view, unless it must be filled up."""
        axes, shape = self.axes[path], self.part_shape(path, array.shape)
        slices, missing = [], []
        for axis, part_length, length in zip(axes, shape, array.shape, strict=True):
            number = device if axis in CUT_AXES else 0
            if axis == "kv_heads" and self.num_kv_heads < self.num_devices:
                number = device * self.num_kv_heads // self.num_devices
            start = min(number * part_length, length)
            end = min(start + part_length, length)
            slices.append(slice(start, end))
            missing.append((0, start + part_length - end))
        part = array[tuple(slices)]
        return np.pad(part, missing) if any(more for _, more in missing) else part


@dataclass(frozen=True)
class Placement:
    """Puts parameters on a mesh one after the other: `put` is what `parameters.fill` takes."""

    mesh: Mesh
    cut: Cut

    def put(self, path: str, array: jax.Array | np.ndarray) -> jax.Array:
        """The parameter on the mesh. Nothing but a device's filled-up part is copied on the host."""
        host = np.asarray(array)
        sharding = self.cut.sharding(self.mesh, path)
        parts = [
            jax.device_put(self.cut.part(path, host, number), device)
            for number, device in enumerate(self.mesh.devices.flat)
        ]
        return jax.make_array_from_single_device_arrays(self.cut.whole_shape(path, host.shape), sharding, parts)


def over_devices(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on every device of the mesh, on its parts of the arguments."""
    # outputs that are whole are equal on all devices by construction; tests compare them with one device's
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


