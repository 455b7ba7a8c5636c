"""Compile for a TPU or GPU that is not here: libtpu and jax's CUDA plugin hold whole compilers, and need no device.

    compiled = compile_for_tpu(step, *shapes, topology="v6e:2x2", donate=0)
    compiled = compile_for_h200(step, *shapes, donate=0)
    compiled.memory_analysis(), compiled.as_text()
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.platform import lowering_for

TPU_TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
"""What tests compile for. One device is used; these are the smallest groups of them that libtpu describes."""

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 } device_vendor: "NVIDIA Corporation" device_address_bits: 64
  platform_version: "Compute Capability 9.0a" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
"""What XLA asks an H200 for, as a GpuTargetConfigProto; the numbers are those of the device's properties."""


def missing_for_tpu() -> str | None:
    """What has to be installed before `compile_for_tpu` works; None when nothing is missing."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jaxpaged[aot]' brings the version that fits jax"
    return None


def missing_for_h200() -> str | None:
    """What has to be installed before `compile_for_h200` works; None when nothing is missing."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or importlib.util.find_spec("jax_plugins") is None:
        return (
            "jax's CUDA plugin is not installed: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, both of "
            "jax's own version (no CUDA needed)"
        )
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
    return _compile(
        function, shapes, topologies.get_topology_desc(topology_name=topology, platform="tpu"), "tpu", donate
    )


def tpu_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU topology that is not here, to make a mesh of for `compile_over_tpus`."""
    return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def compile_over_tpus(
    function: Callable[..., Any], *shapes: Any, donate: int | Sequence[int] = ()
) -> jax.stages.Compiled:
    """`function` compiled for a mesh of `tpu_devices`: `shapes` have shardings, and kernels stand in a `shard_map`.

    Raises as `compile_for_tpu` does.
    """
    missing = missing_for_tpu()
    if missing is not None:
        raise RuntimeError(missing)
    return _compiled(jax.jit(function, donate_argnums=donate), shapes, "tpu", None)


def compile_for_h200(
    function: Callable[..., Any],
    *shapes: Any,
    donate: int | Sequence[int] = (),
    compiler_options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """The same for an H200. Where XLA would try variants on the device, it takes its first choice.

    `compiler_options` are XLA's: `{"xla_dump_to": folder}` writes what it made, the list of launches among it. Raises
    RuntimeError where the CUDA plugin is missing or does not fit jax, and whatever the compiler raises.
    """
    missing = missing_for_h200()
    if missing is not None:
        raise RuntimeError(missing)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return _compile(function, shapes, topology, "cuda", donate, compiler_options)


def _compile(
    function: Callable[..., Any],
    shapes: Any,
    topology: Any,
    platform: str,
    donate: int | Sequence[int],
    compiler_options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    device = topology.devices[0]
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(function, donate_argnums=donate, in_shardings=sharding, out_shardings=sharding)
    num_cores = getattr(device, "core_count", None) or 1
    with lowering_for(platform, device.device_kind, num_cores):
        return _compiled(jitted, shapes, platform, compiler_options)


def _compiled(
    jitted: Any, shapes: Any, platform: str, compiler_options: dict[str, Any] | None
) -> jax.stages.Compiled:
    with warnings.catch_warnings():
        # without a device, jax cannot load such a program from its persistent cache: it says so and compiles again
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return jitted.trace(*shapes).lower(lowering_platforms=(platform,)).compile(compiler_options)
