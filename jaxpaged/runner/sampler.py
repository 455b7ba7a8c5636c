"""Draws the next token of every logit row.

Order: logits processors and grammars (`logit_edits.py`); then, as in vLLM, allowed tokens, bad words, ban of stop
tokens (`min_tokens`), logit bias, penalties (`logits.py`); rows of temperature 0 then take the maximum; the others are
divided by the temperature, cut by min_p, top_k, top_p (`truncation.py`), and drawn. Log-probabilities are of the logits
as the model gave them (raw), or as the token was drawn from them (processed).

A row depends on nothing but its own logits, columns and state: not on the batch, the bucket, or its place in them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jaxpaged.config import LogprobsMode
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
from jaxpaged.runner.truncation import Truncation, keep_all, truncate

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
FINE, NOT_FINITE, NOTHING_LEFT = 1, 0, -1
"""Status of a row: as it should be; its logits hold a NaN or have no finite maximum; every token was banned."""


_Logprobs = tuple[
    Float32[Array, "rows"], Int32[Array, "rows"], Int32[Array, "rows top"], Float32[Array, "rows top"]
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerOutput:
    """One entry per logit row."""

    tokens: Int32[Array, "rows"]
    """Ids in the vocabulary, even in rows that are not finite."""
    finite: Bool[Array, "rows"]
    """False where the logits hold a NaN, their maximum is not finite, or every token was banned."""
    status: Int32[Array, "rows"]
    """Why: FINE, NOT_FINITE, NOTHING_LEFT, or what the logits processors said."""
    logprob: Float32[Array, "rows"]
    """Of the sampled token, or of the target where there is one (its logit, if the engine's `logprobs_mode` says so);
    0 in a step without logprobs, as below."""
    rank: Int32[Array, "rows"]
    """1 where no token is likelier."""
    top_ids: Int32[Array, "rows top"]
    """Most likely first."""
    top_logprobs: Float32[Array, "rows top"]


def sample(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    batch: SamplingBatch,
    max_logprobs: int,
    mode: LogprobsMode = "raw_logprobs",
    edited: tuple[Float32[Array, "rows vocab"], Int32[Array, "rows"]] | None = None,
) -> tuple[SamplerOutput, SamplerState]:
    """The sampled tokens, and the state with them written into the history; jit it and donate `state`.

    A step whose rows are all greedy, without lists or penalties, pays for one maximum over the logits.

    Args:
        mode: What is reported of the sampled tokens: of `logits` (raw), or of what is drawn from (processed).
        edited: The logits after logits processors and grammars, and the rows' trouble with them (0 for none).
    """
    given = logits if edited is None else edited[0]
    if edited is None:
        is_plain = ~(
            batch.any_random
            | batch.any_penalty
            | batch.any_bias
            | batch.any_allowed
            | batch.any_bad_words
            | batch.any_ban
        )
        tokens, status = lax.cond(is_plain, _take_best, _draw, logits, state, batch)
    else:
        # looked at before a mask can hide a NaN
        _, was_finite = maximum(logits)
        tokens, status = _draw(given, state, batch)
        # every token masked looks like no finite logit
        status = jnp.where(was_finite & (status == NOT_FINITE), NOTHING_LEFT, status)
        status = jnp.where(was_finite, jnp.where(edited[1] != 0, edited[1], status), NOT_FINITE)

    def reported() -> _Logprobs:
        shown = logits if mode.startswith("raw") else _drawn_from(given, state, batch)
        wanted = jnp.where(batch.has_target, batch.target_ids, tokens)
        return token_logprobs(shown, wanted, max_logprobs, are_logits=mode.endswith("logits"))

    logprob, rank, top_ids, top_logprobs = lax.cond(
        batch.any_logprobs, reported, lambda: _no_logprobs(logits.shape[0], max_logprobs)
    )
    history = state.history.at[batch.write_rows, batch.position].set(tokens, mode="drop")
    output = SamplerOutput(tokens, status == FINE, status, logprob, rank, top_ids, top_logprobs)
    return output, replace(state, history=history)


def _no_logprobs(num_rows: int, num_top: int) -> _Logprobs:
    return (
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.float32),
    )


def _take_best(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, "rows"], Int32[Array, "rows"]]:
    best, finite = maximum(logits)
    return first_argmax(logits, best), jnp.where(finite, FINE, NOT_FINITE)


def _draw(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, "rows"], Int32[Array, "rows"]]:
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
    return tokens, jnp.where(was_finite, jnp.where(is_finite, FINE, NOTHING_LEFT), NOT_FINITE)


def _drawn_from(
    logits: Float32[Array, "rows vocab"], state: SamplerState, batch: SamplingBatch
) -> Float32[Array, "rows vocab"]:
    """The logits that a row's token is drawn from: -inf for tokens that were banned or cut off, divided by its
    temperature where it is not greedy."""
    processed = process(logits, state, batch)
    best, _ = maximum(processed)
    is_random = batch.temperature >= GREEDY_TEMPERATURE
    temperature = jnp.where(is_random, batch.temperature, 1.0)[:, None]
    away = (best[:, None] - processed) / temperature
    threshold = _truncated(lambda: away, batch).threshold[:, None]
    return jnp.where(away <= threshold, processed / temperature, -jnp.inf)


def _truncated(distances: Callable[[], Float32[Array, "rows vocab"]], batch: SamplingBatch) -> Truncation:
    """What min_p, top_k and top_p leave of each row; a greedy row must not send the others the long way."""
    is_random = batch.temperature >= GREEDY_TEMPERATURE

    def cut() -> Truncation:
        top_k = jnp.where(is_random, batch.top_k, 0)
        top_p = jnp.where(is_random, batch.top_p, 1.0)
        return truncate(distances(), jnp.where(is_random, batch.min_p, 0.0), top_k, top_p)

    return lax.cond(batch.any_truncation, cut, lambda: keep_all(*jax.eval_shape(distances).shape))


def _draw_random(
    logits: Float32[Array, "rows vocab"], best: Float32[Array, "rows"], batch: SamplingBatch
) -> Int32[Array, "rows"]:
    """One draw per row from softmax(logits / temperature) after truncation, by the Gumbel-max trick."""
    is_random = batch.temperature >= GREEDY_TEMPERATURE
    temperature = jnp.where(is_random, batch.temperature, 1.0)

    def distances() -> Float32[Array, "rows vocab"]:
        # differences first: no temperature, however small, makes an infinity of two finite logits' difference of 0
        return (best[:, None] - logits) / temperature[:, None]

    left = _truncated(distances, batch)
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
