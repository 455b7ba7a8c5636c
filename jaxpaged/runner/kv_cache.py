"""The memory plan: weights, activations and KV blocks against what the device and the host have."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxpaged.config import GIB, EngineConfig
from jaxpaged.core.table_layout import TableLayout
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.layer_groups import LayerGroups

CPU_KV_BYTES = 4 * GIB
"""On a CPU the KV cache shares the memory with everything else: it takes no more than this unless asked to."""
AUTO_HOST_BYTES = 4 * GIB


@runtime_checkable
class Device(Protocol):
    """What the plan asks of a jax.Device."""

    platform: str
    device_kind: str

    def memory_stats(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, and the number of blocks that follow."""

    device_kind: str
    num_devices: int
    """Devices that share the model; each has a part of the weights and of every block."""
    device_bytes: int | None
    """What the device has (on a CPU: what is available now); None where it does not tell."""
    device_memory_fraction: float
    """The part of it the engine may fill."""
    weight_bytes: int
    activation_bytes: int
    """A bound on what one step needs besides weights and cache: hidden states, MLP, logits."""
    sampler_bytes: int
    block_bytes: int
    """One block in all layers of a group, on one device."""
    groups: LayerGroups
    blocks_per_sequence: int
    """Most blocks that one sequence of `max_model_len` tokens holds."""
    num_device_blocks: int
    num_host_blocks: int
    block_size: int
    max_model_len: int
    limited_by: str
    """What decided the number of device blocks: "memory", "need" (all sequences at full length) or "flag"."""

    @property
    def kv_bytes(self) -> int:
        return self.num_device_blocks * self.block_bytes

    @property
    def host_bytes(self) -> int:
        return self.num_host_blocks * self.block_bytes * self.num_devices

    def table(self) -> str:
        """The plan for a person to read. The null block of each pool holds no tokens and is not counted as a block."""
        mib = 2**20
        blocks = self.num_device_blocks - 1
        size, usable = "of unknown size", "unknown"
        if self.device_bytes is not None:
            size = f"{self.device_bytes / mib:,.0f} MiB"
            usable = f"{self.device_bytes * self.device_memory_fraction / mib:,.0f} MiB"
        devices = self.device_kind if self.num_devices == 1 else f"{self.num_devices} x {self.device_kind}, each"
        capacity = f"{blocks * self.block_size:,} tokens"
        if self.groups.windows != (None,):
            capacity = f"{blocks // self.blocks_per_sequence:,} sequences of the greatest length"
        rows = (
            ("device", f"{devices}, {size}"),
            ("usable", usable),
            ("weights", f"{self.weight_bytes / mib:,.1f} MiB"),
            ("activations, at most", f"{self.activation_bytes / mib:,.1f} MiB"),
            ("sampler state", f"{self.sampler_bytes / mib:,.1f} MiB"),
            (
                "KV cache",
                f"{self.kv_bytes / mib:,.1f} MiB: {blocks:,} blocks of {self.block_size} tokens ({self.block_bytes:,} "
                f"bytes each) and the null block, {capacity}; limited by {self.limited_by}",
            ),
            ("host blocks for swapping", f"{self.num_host_blocks - 1:,} ({self.host_bytes / mib:,.1f} MiB)"),
            ("longest sequence", f"{self.max_model_len:,} tokens"),
            *self._window_rows(),
        )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _window_rows(self) -> list[tuple[str, str]]:
        """How layers with windows share the blocks; nothing where none has one."""
        windows = self.groups.windows
        if windows == (None,):
            return []
        counts = {window: windows.count(window) for window in windows}
        parts = [
            f"{count} {'without a window' if window is None else f'with a window of {window:,} tokens'}"
            for window, count in counts.items()
        ]
        kinds = f"groups of {self.groups.size} layers: {', '.join(parts)}"
        return [("layer groups", f"{kinds}; {self.blocks_per_sequence:,} blocks a longest sequence")]


def available_host_bytes() -> int:
    """Bytes of host memory that can be had without swapping (Linux: MemAvailable; elsewhere: free pages)."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 * GIB


def device_bytes(device: Device) -> int | None:
    """Bytes of memory on a device, None if it does not tell; for a CPU, the host memory available now."""
    if device.platform == "cpu":
        return available_host_bytes()
    size = (device.memory_stats() or {}).get("bytes_limit")
    return None if size is None else int(size)


def activation_bytes(
    config: ModelConfig, *, num_tokens: int, num_logits: int, itemsize: int, num_devices: int = 1
) -> int:
    """A bound on the temporaries of one step of this size, on one of the devices that share the model."""
    cut = 3 * config.mlp_dim + 2 * config.num_q_heads * config.head_dim
    whole = 4 * config.model_dim
    if config.experts is not None:  # each token once for each of its experts
        whole += 3 * config.experts.num_experts_per_token * config.model_dim
        cut += 3 * config.experts.num_experts_per_token * config.experts.expert_dim
    widest = whole + -(-cut // num_devices)
    return num_tokens * widest * max(itemsize, 4) + 4 * num_logits * config.vocab_size * 4


def plan_memory(
    engine_config: EngineConfig,
    model_config: ModelConfig,
    *,
    device: Device,
    weight_bytes: int,
    layer_block_bytes: int,
    groups: LayerGroups,
    sampler_bytes: int,
    itemsize: int,
    max_model_len: int,
    num_tokens: int,
    num_logits: int,
) -> MemoryPlan:
    """Choose the number of device and host blocks. Nothing is allocated, and no weight has to be loaded.

    `weight_bytes`, `layer_block_bytes` and `sampler_bytes` are those of one device.

    Raises ValueError, with the figures, where the model does not fit, where not one sequence of `max_model_len` would,
    or where more blocks are asked for than there is memory.
    """
    num_devices = engine_config.tensor_parallel_size
    total = device_bytes(device)
    if total is not None and device.platform == "cpu":
        total //= num_devices  # virtual devices share the host's memory
    activations = activation_bytes(
        model_config, num_tokens=num_tokens, num_logits=num_logits, itemsize=itemsize, num_devices=num_devices
    )
    besides = weight_bytes + activations + sampler_bytes
    block_bytes = layer_block_bytes * groups.size
    tables = TableLayout(engine_config.block_size, groups.windows)
    per_sequence = tables.most_blocks(max_model_len, engine_config.max_num_batched_tokens)
    num_device_blocks, limited_by = _num_device_blocks(
        engine_config, device, total, besides, block_bytes, max_model_len, per_sequence
    )
    on_all_devices = num_devices * (besides + num_device_blocks * block_bytes)
    in_host_memory = on_all_devices if device.platform == "cpu" else 0
    return MemoryPlan(
        device_kind=device.device_kind,
        num_devices=num_devices,
        device_bytes=total,
        device_memory_fraction=engine_config.device_memory_fraction,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        sampler_bytes=sampler_bytes,
        block_bytes=block_bytes,
        groups=groups,
        blocks_per_sequence=per_sequence,
        num_device_blocks=num_device_blocks,
        num_host_blocks=_num_host_blocks(
            engine_config, num_device_blocks, block_bytes * num_devices, in_host_memory
        ),
        block_size=engine_config.block_size,
        max_model_len=max_model_len,
        limited_by=limited_by,
    )


def _num_device_blocks(
    config: EngineConfig,
    device: Device,
    total: int | None,
    besides: int,
    block_bytes: int,
    max_model_len: int,
    per_sequence: int,
) -> tuple[int, str]:
    """Blocks on the device, the null block included, and what decided it; `besides` is all that is not cache."""
    asked = config.num_device_blocks
    if asked is not None:
        if total is not None and asked * block_bytes > total - besides:
            raise ValueError(
                f"num_device_blocks={asked} needs {asked * block_bytes:,} bytes, but {device.device_kind} has "
                f"{total:,} and {besides:,} go to weights and activations: at most "
                f"{max(total - besides, 0) // block_bytes} blocks fit"
            )
        return asked, "flag"
    if total is None:
        raise ValueError(f"{device.device_kind} does not tell its memory size: set num_device_blocks")
    left = int(total * config.device_memory_fraction) - besides
    if device.platform == "cpu":
        left = min(left, CPU_KV_BYTES)
    need = config.max_num_seqs * per_sequence + 1
    fitting = left // block_bytes
    if fitting >= need:
        return need, "need"
    if fitting < per_sequence + 1:
        raise ValueError(
            f"the KV cache of one sequence of {max_model_len} tokens needs {per_sequence + 1} blocks of "
            f"{block_bytes} bytes, but {max(left, 0):,} bytes are left on {device.device_kind} ({total:,} in all, "
            f"{besides:,} for weights and activations): lower max_model_len or max_num_batched_tokens, or raise "
            "device_memory_fraction"
        )
    return fitting, "memory"


def _num_host_blocks(config: EngineConfig, num_device_blocks: int, block_bytes: int, in_host_memory: int) -> int:
    """Blocks in the host pool, its null block included.

    `block_bytes` are those of a block on all devices, `in_host_memory` what CPU devices take there themselves.
    """
    available = available_host_bytes()
    if isinstance(config.host_memory_bytes, int):
        host = config.host_memory_bytes
        if host > available - in_host_memory:
            raise ValueError(
                f"host_memory_bytes={host:,}: {available:,} bytes of host memory are available, of which "
                f"{in_host_memory:,} go to the model and its KV cache: lower it (swap_space is the same in GiB)"
            )
        if 0 < host < block_bytes and config.preemption != "swap":
            raise ValueError(
                f"host_memory_bytes={host:,} holds no block: one takes {block_bytes:,} bytes; raise it, or give 0 for "
                "no swapping"
            )
    else:  # "auto": never more than the device pool holds, since a victim leaves room there when it comes here
        host = min(AUTO_HOST_BYTES, available // 4, num_device_blocks * block_bytes)
    usable = host // block_bytes
    if config.preemption == "swap" and not usable:
        raise ValueError(
            f"preemption='swap' with host_memory_bytes={host:,}: a block takes {block_bytes:,} bytes, so none could "
            "be swapped out; raise host_memory_bytes, or choose preemption='recompute'"
        )
    return usable + 1
