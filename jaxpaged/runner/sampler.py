"""Draws the next token of every logit row.

Order, as in vLLM: allowed tokens, bad words, ban of stop tokens (`min_tokens`), logit bias, penalties (`logits.py`);
rows of temperature 0 then take the maximum; the others are divided by the temperature, cut by min_p, top_k, top_p
(`truncation.py`), and drawn. Log-probabilities are of the logits as the model gave them.

A row depends on nothing but its own logits, columns and state: not on the batch, the bucket, or its place in them.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxpaged.runner.logits import first_argmax, maximum, process, token_logprobs
from jaxpaged.runner.noise import gumbel_noise, sampling_keys
from jaxpaged.runner.sampler_state import (
    MAX_BAD_WORD_TOKENS,
    SamplerState,
    init_state,
    load_row,
    pack_row,
    state_bytes,
)
from jaxpaged.runner.sampling_batch import SamplingBatch
from jaxpaged.runner.truncation import keep_all, truncate

__all__ = [
    "MAX_BAD_WORD_TOKENS",
    "SamplerOutput",
    "SamplerState",
    "SamplingBatch",
    "init_state",
    "load_row",
    "pack_row",
    "sample",
    "state_bytes",
]

GREEDY_TEMPERATURE = 1e-5
"""Below this a row is greedy, as in vLLM."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerOutput:
    """One entry per logit row."""

    tokens: Int32[Array, "rows"]
    """Ids in the vocabulary, even in rows that are not finite."""
    finite: Bool[Array, "rows"]
    """False where the logits hold a NaN, their maximum is not finite, or every token was banned."""
    logprob: Float32[Array, "rows"]
    """Of the sampled token, or of the target where there is one; 0 in a step without logprobs, as below."""
    rank: Int32[Array, "rows"]
    """1 where no token is likelier."""
    top_ids: Int32[Array, "rows top"]
    """Most likely first."""
    top_logprobs: Float32[Array, "rows top"]


def sample(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch, max_logprobs: int
) -> tuple[SamplerOutput, SamplerState]:
    """The sampled tokens, and the state with them written into the history; jit it and donate `state`.

    A step whose rows are all greedy, without lists or penalties, pays for one maximum over the logits.
    """
    is_plain = ~(
        batch.any_random
        | batch.any_penalty
        | batch.any_bias
        | batch.any_allowed
        | batch.any_bad_words
        | batch.any_ban
    )
    tokens, finite = lax.cond(is_plain, _take_best, _draw, logits, state, batch)
    logprob, rank, top_ids, top_logprobs = lax.cond(
        batch.any_logprobs,
        lambda: token_logprobs(logits, jnp.where(batch.has_target, batch.target_ids, tokens), max_logprobs),
        lambda: _no_logprobs(logits.shape[0], max_logprobs),
    )
    history = state.history.at[batch.write_rows, batch.position].set(tokens, mode="drop")
    return SamplerOutput(tokens, finite, logprob, rank, top_ids, top_logprobs), replace(state, history=history)


def _no_logprobs(
    num_rows: int, num_top: int
) -> tuple[Float32[Array, "rows"], Int32[Array, "rows"], Int32[Array, "rows top"], Float32[Array, "rows top"]]:
    return (
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.float32),
    )


def _take_best(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, "rows"], Bool[Array, "rows"]]:
    best, finite = maximum(logits)
    return first_argmax(logits, best), finite


def _draw(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, "rows"], Bool[Array, "rows"]]:
    # looked at before any stage can hide a NaN behind a ban
    _, was_finite = maximum(logits)
    processed = process(logits, state, batch)
    best, is_finite = maximum(processed)
    greedy = first_argmax(processed, best)
    tokens = lax.cond(
        batch.any_random,
        lambda: jnp.where(batch.temperature < GREEDY_TEMPERATURE, greedy, _draw_random(processed, best, batch)),
        lambda: greedy,
    )
    return tokens, was_finite & is_finite


def _draw_random(
    logits: Float32[Array, "rows vocab"], best: Float32[Array, "rows"], batch: SamplingBatch
) -> Int32[Array, "rows"]:
    """One draw per row from softmax(logits / temperature) after truncation, by the Gumbel-max trick."""
    is_random = batch.temperature >= GREEDY_TEMPERATURE
    temperature = jnp.where(is_random, batch.temperature, 1.0)

    def distances() -> Float32[Array, "rows vocab"]:
        # differences first: no temperature, however small, makes an infinity of two finite logits' difference of 0
        return (best[:, None] - logits) / temperature[:, None]

    left = lax.cond(
        batch.any_truncation,
        # a greedy row must not send the others the long way
        lambda: truncate(
            distances(), batch.min_p, jnp.where(is_random, batch.top_k, 0), jnp.where(is_random, batch.top_p, 1.0)
        ),
        lambda: keep_all(*logits.shape),
    )
    keys = sampling_keys(batch)

    def over_candidates() -> Int32[Array, "rows"]:
        scores = lax.optimization_barrier(gumbel_noise(keys, left.candidate_ids) - left.candidates)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        # of equal scores the smallest id, as over the whole row
        ids = jnp.where(scores == highest, left.candidate_ids, logits.shape[1])
        return jnp.minimum(jnp.min(ids, axis=-1), logits.shape[1] - 1)

    def over_all() -> Int32[Array, "rows"]:
        noise = gumbel_noise(keys, lax.broadcasted_iota(jnp.int32, logits.shape, 1))
        away = distances()
        # made once: the maximum must meet the very bits it was found among
        scores = lax.optimization_barrier(jnp.where(away <= left.threshold[:, None], noise - away, -jnp.inf))
        return first_argmax(scores, maximum(scores)[0])

    return lax.cond(jnp.all(left.is_narrow | ~is_random), over_candidates, over_all)
