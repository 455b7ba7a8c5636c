"""The memory plan: weights, activations and KV blocks against what the device and the host have."""

import os
from dataclasses import dataclass

import jax

from jaxpaged.config import GIB, EngineConfig
from jaxpaged.models.config import ModelConfig

CPU_KV_BYTES = 4 * GIB
"""On a CPU the KV cache shares the memory with everything else: it takes no more than this unless asked to."""
AUTO_HOST_BYTES = 4 * GIB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, and the number of blocks that follow."""

    device_kind: str
    device_bytes: int
    """What the device has (on a CPU: what is available now)."""
    usable_bytes: int
    """The part the engine may fill."""
    weight_bytes: int
    activation_bytes: int
    """A bound on what one step needs besides weights and cache: hidden states, MLP, logits."""
    sampler_bytes: int
    block_bytes: int
    """One block in all layers."""
    num_device_blocks: int
    num_host_blocks: int
    block_size: int
    max_model_len: int
    limited_by: str
    """What decided the number of device blocks: "memory", "need" (all sequences at full length) or "flag"."""

    @property
    def kv_bytes(self) -> int:
        return self.num_device_blocks * self.block_bytes

    def table(self) -> str:
        """The plan for a person to read."""
        mib = 2**20
        tokens = (self.num_device_blocks - 1) * self.block_size
        rows = (
            ("device", f"{self.device_kind}, {self.device_bytes / mib:,.0f} MiB"),
            ("usable", f"{self.usable_bytes / mib:,.0f} MiB"),
            ("weights", f"{self.weight_bytes / mib:,.1f} MiB"),
            ("activations, at most", f"{self.activation_bytes / mib:,.1f} MiB"),
            ("sampler state", f"{self.sampler_bytes / mib:,.1f} MiB"),
            (
                "KV cache",
                f"{self.kv_bytes / mib:,.1f} MiB: {self.num_device_blocks:,} blocks of {self.block_size} tokens "
                f"({self.block_bytes:,} bytes each), {tokens:,} tokens; limited by {self.limited_by}",
            ),
            (
                "host blocks for swapping",
                f"{self.num_host_blocks:,} ({self.num_host_blocks * self.block_bytes / mib:,.1f} MiB)",
            ),
            ("longest sequence", f"{self.max_model_len:,} tokens"),
        )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


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


def device_bytes(device: jax.Device) -> int:
    """Bytes of memory on a device; for a CPU, the host memory available now."""
    if device.platform == "cpu":
        return available_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(f"{device} does not tell its memory size: set num_device_blocks")
    return int(stats["bytes_limit"])


def activation_bytes(config: ModelConfig, *, num_tokens: int, num_logits: int, itemsize: int) -> int:
    """A bound on the temporaries of one step of this size."""
    widest = 4 * config.model_dim + 3 * config.mlp_dim + 2 * config.num_q_heads * config.head_dim
    return num_tokens * widest * max(itemsize, 4) + 4 * num_logits * config.vocab_size * 4


def plan_memory(
    engine_config: EngineConfig,
    model_config: ModelConfig,
    *,
    device: jax.Device,
    weight_bytes: int,
    layer_block_bytes: int,
    sampler_bytes: int,
    itemsize: int,
    max_model_len: int,
    num_tokens: int,
    num_logits: int,
) -> MemoryPlan:
    """Choose the number of device and host blocks. Nothing is allocated, and no weight has to be loaded.

    Raises ValueError, with the figures, where the model does not fit or not one sequence of `max_model_len` would.
    """
    total = device_bytes(device)
    usable = int(total * engine_config.device_memory_fraction)
    activations = activation_bytes(model_config, num_tokens=num_tokens, num_logits=num_logits, itemsize=itemsize)
    block_bytes = layer_block_bytes * model_config.num_layers
    left = usable - weight_bytes - activations - sampler_bytes
    if device.platform == "cpu":
        left = min(left, CPU_KV_BYTES)
    per_sequence = -(-max_model_len // engine_config.block_size)
    need = engine_config.max_num_seqs * per_sequence + 1
    fitting = left // block_bytes
    if engine_config.num_device_blocks is not None:
        num_device_blocks, limited_by = engine_config.num_device_blocks, "flag"
    elif fitting >= need:
        num_device_blocks, limited_by = need, "need"
    else:
        num_device_blocks, limited_by = fitting, "memory"
        if fitting < per_sequence + 1:
            raise ValueError(
                f"the KV cache of one sequence of {max_model_len} tokens needs {per_sequence + 1} blocks of "
                f"{block_bytes} bytes, but {max(left, 0):,} bytes are left on {device.device_kind} ({total:,} in all, "
                f"{weight_bytes:,} for weights): lower max_model_len or max_num_batched_tokens, or raise "
                "device_memory_fraction"
            )
    if isinstance(engine_config.host_memory_bytes, int):
        host = engine_config.host_memory_bytes
    else:  # "auto": never more than the device pool holds, since a victim leaves room there when it comes here
        host = min(AUTO_HOST_BYTES, available_host_bytes() // 4, num_device_blocks * block_bytes)
    num_host_blocks = max(int(host // block_bytes), 0) + 1  # its block 0 is never given out either
    return MemoryPlan(
        device_kind=device.device_kind,
        device_bytes=total,
        usable_bytes=usable,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        sampler_bytes=sampler_bytes,
        block_bytes=block_bytes,
        num_device_blocks=int(num_device_blocks),
        num_host_blocks=num_host_blocks,
        block_size=engine_config.block_size,
        max_model_len=max_model_len,
        limited_by=limited_by,
    )
