"""What a program is being made for: the default backend, or a device that is not here."""

import re
from contextlib import AbstractContextManager

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, get_abstract_mesh, use_abstract_mesh

HOPPER_KINDS = r"NVIDIA G?H(20|100|200|800)\b"
"""Of device kinds as jax names them."""


def target_platform() -> str:
    """The platform that is traced for, as `jax.default_backend()` names it, or as `lowering_for` was told."""
    device = _abstract_device()
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """The kind of the device that is traced for, as jax names it ("NVIDIA H200")."""
    device = _abstract_device()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def target_compute_capability() -> str | None:
    """The compute capability ("9.0") of the NVIDIA GPU that is traced for; None where it is none or is not known."""
    device = _abstract_device()
    if device is None:
        return getattr(jax.devices()[0], "compute_capability", None)
    return "9.0" if re.match(HOPPER_KINDS, device.device_kind) else None


def target_num_multiprocessors() -> int | None:
    """Multiprocessors of the NVIDIA GPU that is traced for; None where it is none or is not known."""
    device = _abstract_device()
    if device is None:
        num_cores = getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
    else:
        num_cores = device.num_cores if device.platform in ("gpu", "cuda") else None
    return num_cores if num_cores is not None and num_cores > 1 else None


def lowering_for(platform: str, device_kind: str, num_cores: int = 1) -> AbstractContextManager[AbstractMesh]:
    """A context in which programs are traced for one device of another platform than the default backend.

    `device_kind` is jax's name of it ("TPU v5 lite"), `num_cores` what jax counts of it: a GPU's multiprocessors, 1
    for not known. The context is jax's own (an abstract mesh of one device), so nothing is kept here and jit does not
    mix up what it traced inside and outside.
    """
    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device))


def _abstract_device() -> AbstractDevice | None:
    mesh = get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device
