"""The truth that kernels are held against on a device: attention in float64, by numpy, from what a cache holds.

It shares no code with any implementation but how a head becomes bytes, and needs no device.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KVLayout
from pallas_kernels.cases import BatchCase, make_batch
from pallas_kernels.paged_attention.quantization import is_quantized, quantize


@functools.lru_cache(maxsize=64)
def attend_in_float64(case: BatchCase) -> np.ndarray:
    """Outputs [tokens, q_heads, head_dim] of the real tokens of `make_batch(case, ...)`."""
    batch = make_batch(case, "reference")
    heads, block_size = case.heads, case.block_size
    layout = KVLayout(
        num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, block_size=block_size, dtype=case.dtype,
        implementation="reference",
    )  # fmt: skip
    cached = [_float64(side) for side in layout.unpack(batch.kv)]
    new = [_float64(_as_stored(np.asarray(side), case.dtype)) for side in (batch.key, batch.value)]
    query = _float64(np.asarray(batch.query))
    tables, sinks = np.asarray(batch.metadata.block_tables), batch.options["sinks"]
    outputs, token = [], 0
    for row, (context, length) in enumerate(case.sequences):
        # what lies before the window of the first new token is seen by nobody, and may be anybody's
        start = 0 if case.window is None else max(context - length - case.window + 1, 0)
        old = np.arange(start, context - length)
        where = tables[row, old // block_size], old % block_size
        keys, values = (
            np.concatenate([side[where], fresh[token : token + length]])
            for side, fresh in zip(cached, new, strict=True)
        )
        distance = np.arange(context - length, context)[:, None] - np.arange(start, context)
        is_seen = (distance >= 0) & (distance < (case.window or context))
        outputs.append(_attend(case, query[token : token + length], keys, values, is_seen, sinks))
        token += length
    return np.concatenate(outputs)


def _attend(
    case: BatchCase, query: np.ndarray, keys: np.ndarray, values: np.ndarray, is_seen: np.ndarray, sinks: Any
) -> np.ndarray:
    """One sequence: query [new, q_heads, head_dim], keys and values [seen, kv_heads, head_dim]."""
    group = case.heads.num_q_heads // case.heads.num_kv_heads
    output = np.empty_like(query)
    for head in range(case.heads.num_q_heads):
        scores = query[:, head] @ keys[:, head // group].T * case.scale
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        scores = np.where(is_seen, scores, -np.inf)
        sink = -np.inf if sinks is None else float(sinks[head])
        highest = np.maximum(scores.max(1), sink)
        weights = np.exp(scores - highest[:, None])
        total = weights.sum(1) + np.exp(sink - highest)
        output[:, head] = weights @ values[:, head // group] / total[:, None]
    return output


def _as_stored(heads: np.ndarray, dtype: str) -> np.ndarray:
    """New keys or values as the cache keeps them."""
    if is_quantized(dtype):
        # the NaN of padding stands in no real token's scale
        return quantize(heads, jnp.dtype(dtype), np).dequantized()
    return heads.astype(jnp.dtype(dtype))


def _float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32).astype(np.float64)
