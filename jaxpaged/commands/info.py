"""jaxpaged info: versions, devices and kernels."""

import argparse
import importlib.metadata
import platform

import jax

import pallas_kernels
from jaxpaged.models.registry import MODELS


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in ("jaxpaged", "jax", "jaxlib", "flax", "numpy", "transformers", "orbax-checkpoint"):
        print(f"{name:<13} {importlib.metadata.version(name)}")
    for device in jax.devices():
        print(f"device        {device.id}: {device.device_kind} ({device.platform})")
    print(f"models        {', '.join(sorted(MODELS))}")
    print("attention kernels:")
    print(pallas_kernels.explain())
    reason = pallas_kernels.linear_misfit("native_cpu", "float32")
    print(f"linear layers on CPU: {'native_cpu' if reason is None else f'xla (native_cpu {reason})'}")
    return 0
