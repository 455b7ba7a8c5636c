"""Logits processors for tests: one that reads the tokens that the device remembers, one with arguments, one faulty."""

import jax.numpy as jnp
import numpy as np

NO_IDS = np.full(4, -1, np.int32)


def forbid_repeats(logits, context, *, window=8):
    """None of the last `window` tokens again: reads the device's memory of a sequence's, or a beam's, own tokens."""
    positions = jnp.arange(context.token_ids.shape[0])
    is_recent = (positions >= context.num_tokens - window) & (positions < context.num_tokens)
    return logits.at[jnp.where(is_recent, context.token_ids, logits.shape[0])].set(-jnp.inf, mode="drop")


def favour(logits, context, *, ids=NO_IDS, bonus=1.0):
    return logits.at[jnp.where(ids < 0, logits.shape[0], ids)].add(bonus, mode="drop")


def late_nan(logits, context, *, at=3):
    return jnp.where(context.num_tokens - context.num_prompt_tokens >= at, jnp.nan, logits)


PROCESSORS = {"forbid_repeats": forbid_repeats, "favour": favour, "late_nan": late_nan}
