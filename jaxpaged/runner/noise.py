"""The noise of a draw: a function of seed, sample index, position and token id, and of nothing else.

The hash is jax's own, bit for bit (threefry2x32 of 20 rounds: Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). It is written out here because jax runs it on CPUs as a loop of passes over memory; one expression is fused.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jaxpaged.runner.sampling_batch import SamplingBatch

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(
    key: tuple[UInt32[Array, "*#shape"], UInt32[Array, "*#shape"]], count: UInt32[Array, "*#shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """The two words that a key gives for the counter (0, count)."""
    schedule = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY)
    first, second = schedule[0], count + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            first = first + second
            second = (second << jnp.uint32(rotation)) | (second >> jnp.uint32(32 - rotation))
            second = second ^ first
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return first, second


def sampling_keys(batch: SamplingBatch) -> UInt32[Array, "rows 2"]:
    """Key data of fold_in(fold_in(key(seed), sample index), position) for each row."""
    key = batch.seeds[:, 1], batch.seeds[:, 0]
    key = threefry(key, batch.sample_index.astype(jnp.uint32))
    return jnp.stack(threefry(key, batch.position.astype(jnp.uint32)), axis=1)


def gumbel_noise(
    keys: UInt32[Array, "rows 2"], token_ids: Int32[Array, "rows entries"]
) -> Float32[Array, "rows entries"]:
    """Standard Gumbel noise of each token of each row.

    The 32 bits that `jax.random.bits` draws for an id make an exponential variate of fine steps near 0, where the
    largest noise comes from.
    """
    first, second = threefry((keys[:, :1], keys[:, 1:]), token_ids.astype(jnp.uint32))
    uniform = jnp.clip((first ^ second).astype(jnp.float32) * 2.0**-32, 2.0**-33, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
