"""Models with random weights: for benchmarks and tests that need a shape and no knowledge."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.parameters import fill, parameter_specs
from jaxpaged.models.registry import build_abstract


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(
    key: jax.Array,
    centre: jax.Array | float,
    half_width: jax.Array | float,
    *,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    noise = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    return (centre + half_width * noise).astype(dtype)


def random_model(config: ModelConfig, seed: int, *, max_model_len: int | None = None) -> Decoder:
    """Return the model with every parameter random, biases and norm scales included.

    Kernels and the embedding have variance 1 / fan-in, so that activations stay in range at any depth. Drawn on the
    device by its own bit generator: the same seed gives the same weights on the same kind of device only.
    """
    model = build_abstract(config, max_model_len=max_model_len)
    key = jax.random.key(seed, impl="rbg")
    arrays = {}
    for index, (name, spec) in enumerate(parameter_specs(model).items()):
        if name.endswith(".scale"):
            centre, half_width = 1.0, 0.1
        elif name.endswith(".bias"):
            centre, half_width = 0.0, 0.1
        else:
            centre, half_width = 0.0, math.sqrt(3.0 / spec.shape[-1])
        arrays[name] = _draw(
            jax.random.fold_in(key, index), centre, half_width, shape=spec.shape, dtype=spec.dtype
        )
    return fill(model, arrays)
