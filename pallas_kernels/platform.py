"""What a program is being made for: the default backend, or a device that is not here."""

import re
from contextlib import AbstractContextManager

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, get_abstract_mesh, use_abstract_mesh

HOPPER_KINDS = r"NVIDIA G?H(20|100|200|800)\b"
"""Of device kinds as jax names them."""


def target_platform() -> str:
    """The platform that is traced for, as `jax.default_backend()` names it, or as `lowering_for` was told."""
    mesh = get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def target_compute_capability() -> str | None:
    """The compute capability ("9.0") of the NVIDIA GPU that is traced for; None where it is none or is not known."""
    mesh = get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return getattr(jax.devices()[0], "compute_capability", None)
    return "9.0" if re.match(HOPPER_KINDS, device.device_kind) else None


def lowering_for(platform: str, device_kind: str) -> AbstractContextManager[AbstractMesh]:
    """A context in which programs are traced for one device of another platform than the default backend.

    `device_kind` is jax's name of it ("TPU v5 lite"). The context is jax's own (an abstract mesh of one device), so
    nothing is kept here and jit does not mix up what it traced inside and outside.
    """
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device))
