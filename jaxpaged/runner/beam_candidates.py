"""The likeliest continuations of each logit row, for beams: found on the device, compared across rows on the host."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jaxpaged.config import LogprobsMode
from jaxpaged.runner.logits import count, log_sum_exp, process
from jaxpaged.runner.sampler_state import SamplerState
from jaxpaged.runner.sampling_batch import SamplingBatch

LEAST_CANDIDATES = 8
"""Numbers of candidates are rounded up to this times a power of two, so that few programs are compiled."""


def rounded_up(num_candidates: int, vocab_size: int) -> int:
    """Candidates of a row that are computed when `num_candidates` are wanted: as many at least, if there are any."""
    size = LEAST_CANDIDATES
    while size < num_candidates:
        size *= 2
    return min(size, vocab_size)


def beam_candidates(
    num_candidates: int,
    mode: LogprobsMode,
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    batch: SamplingBatch,
    edited: Float32[Array, "rows vocab"] | None = None,
) -> tuple[
    Int32[Array, "rows candidates"],
    Float32[Array, "rows candidates"],
    Float32[Array, "rows candidates"],
    Int32[Array, "rows candidates"],
]:
    """Ids and scores of each row's best continuations, best first, and what is reported of them (log-probability and
    rank), where the step reports log-probabilities.

    A score is the log-probability of the token as the model gave it, plus what logits processors, grammar, bias, bad
    words and allowed tokens add to its logit: probabilities are not made to sum to 1 again, as in Hugging Face's beam
    search.

    Args:
        mode: What is reported: of `logits` (raw), or of what candidates are chosen from (processed).
        edited: The logits after logits processors and grammars.
    """
    best, log_total = log_sum_exp(logits)
    # all readers meet the same bits
    processed = lax.optimization_barrier(process(logits if edited is None else edited, state, batch))
    top, ids = lax.top_k(processed, num_candidates)
    scores = (top - best[:, None]) - log_total[:, None]

    def reported() -> tuple[Array, Array]:
        shown = logits if mode.startswith("raw") else processed
        values = jnp.take_along_axis(shown, ids, axis=1)
        ranks = lax.map(lambda column: 1 + count(shown > column[:, None]), values.T).T
        if mode.endswith("logits"):
            return values, ranks
        highest, log_sum = (best, log_total) if mode.startswith("raw") else log_sum_exp(processed)
        return (values - highest[:, None]) - log_sum[:, None], ranks

    def not_asked() -> tuple[Array, Array]:
        return jnp.zeros_like(scores), jnp.zeros_like(ids)

    logprobs, ranks = jax.lax.cond(batch.any_logprobs, reported, not_asked)
    return ids, scores, logprobs, ranks
