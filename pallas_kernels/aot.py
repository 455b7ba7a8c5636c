"""Compile for a TPU that is not here: libtpu holds the whole compiler, XLA and Mosaic, and does not need one.

    compiled = compile_for_tpu(step, *shapes, topology="v6e:2x2", donate=0)
    compiled.memory_analysis(), compiled.as_text()
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.paged_attention.platform import lowering_for

TPU_TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
"""What tests compile for. One device is used; these are the smallest groups of them that libtpu describes."""


def missing_for_tpu() -> str | None:
    """What has to be installed before `compile_for_tpu` works; None when nothing is missing."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jaxpaged[aot]' brings the version that fits jax"
    return None


def compile_for_tpu(
    function: Callable[..., Any],
    *shapes: Any,
    topology: str = "v5e:2x2",
    donate: int | Sequence[int] = (),
) -> jax.stages.Compiled:
    """`function`, jitted and compiled for one device of `topology`, for its memory and its text to be read.

    `shapes` are the arguments, with jax.ShapeDtypeStruct or arrays as leaves; `donate` are positions of donated ones.
    libtpu looks for a TPU host when it is first used: on a machine that is none, TPU_SKIP_MDS_QUERY=1 in the
    environment saves it minutes. Raises RuntimeError where libtpu is missing, does not fit jax or does not know the
    topology, and whatever the compiler raises.
    """
    missing = missing_for_tpu()
    if missing is not None:
        raise RuntimeError(missing)
    device: Any = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(function, donate_argnums=donate, in_shardings=sharding, out_shardings=sharding)
    with lowering_for("tpu", device.device_kind), warnings.catch_warnings():
        # without a device, jax cannot load such a program from its persistent cache: it says so and compiles again
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return jitted.trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
