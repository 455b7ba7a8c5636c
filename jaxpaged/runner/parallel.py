"""A step on several devices: how weights and caches lie on the mesh, and the step spread over it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import parameter_axes, parameter_specs
from jaxpaged.sharding import Cut, cut_dimension, over_devices, spec_of
from pallas_kernels import KVLayout


@dataclass(frozen=True)
class Parallel:
    """The parts of a model that each device of a mesh has; hashable, so that engines share their compiled steps."""

    mesh: Mesh
    leaves: tuple[PartitionSpec, ...]
    """Of the weights."""
    layer_cache: Any
    """Of one layer's KV cache: a spec for each of its leaves, in their tree."""
    num_caches: int

    @property
    def kv(self) -> Any:
        return (self.layer_cache,) * self.num_caches


def parallel_over(mesh: Mesh, model: nnx.Module, layout: KVLayout, num_caches: int) -> Parallel:
    """How `model`, abstract or filled, and caches of `layout`, which is one device's, lie on the mesh."""
    layer_cache = jax.tree.map(
        lambda leaf, axis: cut_dimension(len(leaf.shape), axis), layout.shapes(1), layout.head_axes
    )
    leaves = tuple(spec_of(axes) for axes in parameter_axes(model).values())
    return Parallel(mesh, leaves, layer_cache, num_caches)


def cut_over(num_devices: int, model: Decoder) -> Cut:
    """How the parameters of `model`, abstract or filled, are cut over so many devices."""
    return Cut(num_devices, model.config.num_kv_heads, parameter_axes(model))


def parameter_shapes(mesh: Mesh, model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of an abstract model as they lie on the mesh, by path."""
    cut = cut_over(mesh.size, model)
    return {
        path: jax.ShapeDtypeStruct(cut.whole_shape(path, spec.shape), spec.dtype, sharding=cut.sharding(mesh, path))
        for path, spec in parameter_specs(model).items()
    }


def cache_shapes(parallel: Parallel, layout: KVLayout, num_blocks: int) -> Any:
    """All caches of all devices, as jax.ShapeDtypeStruct with shardings."""

    def joined(leaf: jax.ShapeDtypeStruct, axis: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        shape[axis] *= parallel.mesh.size
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=NamedSharding(parallel.mesh, spec))

    layer = jax.tree.map(joined, layout.shapes(num_blocks), layout.head_axes, parallel.layer_cache)
    return (layer,) * parallel.num_caches


def empty_cache(parallel: Parallel, layout: KVLayout, num_blocks: int) -> Any:
    """Caches of zeros, each device's part made on that device."""

    def empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    return jax.tree.map(empty, cache_shapes(parallel, layout, num_blocks))


def parallel_step(
    parallel: Parallel,
    one_device: Callable[..., Any],
    leaves: tuple[jax.Array, ...],
    kv: Any,
    state: Any,
    packed: jax.Array,
    layout: Any,
) -> Any:
    """`one_device` on each device of the mesh: weights and cache are its parts, all else is the same everywhere."""
    everywhere = PartitionSpec()
    spread = over_devices(
        lambda *arrays: one_device(*arrays, layout),
        parallel.mesh,
        (parallel.leaves, parallel.kv, everywhere, everywhere),
        (parallel.kv, everywhere, everywhere, everywhere, everywhere),
    )
    return spread(leaves, kv, state, packed)
