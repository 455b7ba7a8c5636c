"""Which tokens min_p, top_k and top_p leave to a random row: exact thresholds, found without a sort.

A row is described by its distances d = (best logit - logit) / temperature, 0 for the best token and infinite for a
banned one; a weight is exp(-d). Truncation keeps `d <= threshold`: tokens as likely as the last one kept stay too.

    min_p   the largest distance whose weight is at least min_p
    top_k   smallest threshold that keeps at least k tokens
    top_p   smallest threshold whose tokens hold at least p of the weight that min_p and top_k left

Every threshold is a function of the row alone. Weights are summed as integers, which add up alike in any order, so the
two ways to find a threshold (among the NUM_CANDIDATES nearest tokens, or by bisection) agree to the bit, and a row does
not depend on which of them its neighbours need.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxpaged.runner.logits import count, limb_bits, maximum

NUM_CANDIDATES = 256
"""Nearest tokens looked at before the whole row is bisected."""
INFINITY_BITS = 0x7F800000


class Truncation(NamedTuple):
    """What is left of each row."""

    threshold: Float32[Array, "rows"]
    """The largest distance left; infinite where nothing is cut."""
    candidate_ids: Int32[Array, "rows candidates"]
    candidates: Float32[Array, "rows candidates"]
    """The smallest distances, infinite where they are cut."""
    is_narrow: Bool[Array, "rows"]
    """Whether every token left is among the candidates."""


class Mass(NamedTuple):
    """An exact sum of weights: high * 2**limb_bits + low, in units of 2**-(2 * limb_bits)."""

    high: UInt32[Array, "*rows"]
    low: UInt32[Array, "*rows"]

    def reaches(self, goal: "Mass") -> Bool[Array, "*rows"]:
        return (self.high > goal.high) | ((self.high == goal.high) & (self.low >= goal.low))


def keep_all(num_rows: int, vocab_size: int, num_candidates: int = NUM_CANDIDATES) -> Truncation:
    """What `truncate` would leave if no row asked for anything, without candidates."""
    shape = num_rows, min(num_candidates, vocab_size)
    return Truncation(
        jnp.full(num_rows, jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(num_rows, jnp.bool_),
    )


def truncate(
    distances: Float32[Array, "rows vocab"],
    min_p: Float32[Array, "rows"],
    top_k: Int32[Array, "rows"],
    top_p: Float32[Array, "rows"],
    num_candidates: int = NUM_CANDIDATES,
) -> Truncation:
    """Apply min_p, then top_k, then top_p to every row.

    `num_candidates` changes the cost and what counts as narrow, never the threshold.
    """
    vocab_size = distances.shape[1]
    distances = jnp.abs(distances)  # a zero without sign, because bits are compared
    weights = jnp.exp(-distances)
    negated, ids = lax.top_k(-distances, min(num_candidates, vocab_size))
    candidates = jnp.abs(negated)

    threshold = jnp.where(min_p > 0, _farthest(distances, weights >= min_p[:, None]), jnp.inf)
    # tokens that min_p cuts come after all others: the k nearest of what it leaves are the k nearest, or all it leaves
    threshold = jnp.minimum(threshold, _nearest(distances, candidates, top_k))
    units = jnp.where(distances <= threshold[:, None], _units(weights), jnp.uint32(0))
    nearest_units = jnp.take_along_axis(units, ids, axis=1)
    threshold = jnp.minimum(threshold, _nucleus(distances, units, candidates, nearest_units, top_p))

    # an infinite last candidate means that every token not banned is among them
    is_narrow = (
        (threshold < candidates[:, -1]) | jnp.isinf(candidates[:, -1]) | jnp.bool_(candidates.shape[1] == vocab_size)
    )
    return Truncation(threshold, ids, jnp.where(candidates <= threshold[:, None], candidates, jnp.inf), is_narrow)


def _farthest(
    distances: Float32[Array, "rows vocab"], is_left: Bool[Array, "rows vocab"]
) -> Float32[Array, "rows"]:
    """The largest distance left in each row; the best token is always left."""
    return maximum(jnp.where(is_left, distances, 0.0))[0]


def _nearest(
    distances: Float32[Array, "rows vocab"], candidates: Float32[Array, "rows candidates"], top_k: Int32[Array, "rows"]
) -> Float32[Array, "rows"]:
    """Smallest threshold that keeps at least top_k tokens; infinite where top_k is off."""
    vocab_size, num_candidates = distances.shape[1], candidates.shape[1]
    is_on = (top_k > 0) & (top_k < vocab_size)
    index = jnp.clip(top_k - 1, 0, num_candidates - 1)
    among_candidates = jnp.take_along_axis(candidates, index[:, None], axis=1)[:, 0]
    bits = lax.bitcast_convert_type(distances, jnp.int32)

    def search() -> Float32[Array, "rows"]:
        found = _bisect(lambda middle: count(bits <= middle[:, None]) >= top_k, top_k)
        return jnp.where(top_k <= num_candidates, among_candidates, found)

    needs_search = jnp.any(is_on & (top_k > num_candidates))
    return jnp.where(is_on, lax.cond(needs_search, search, lambda: among_candidates), jnp.inf)


def _nucleus(
    distances: Float32[Array, "rows vocab"],
    units: UInt32[Array, "rows vocab"],
    candidates: Float32[Array, "rows candidates"],
    nearest_units: UInt32[Array, "rows candidates"],
    top_p: Float32[Array, "rows"],
) -> Float32[Array, "rows"]:
    """Smallest threshold whose tokens hold at least top_p of the units; infinite where top_p is off."""
    num_bits = limb_bits(units.shape[1])
    is_on = top_p < 1
    goal = _share(_mass(units, num_bits), top_p, num_bits)
    running = _carry(
        jnp.cumsum(nearest_units >> num_bits, axis=-1, dtype=jnp.uint32),
        jnp.cumsum(_low(nearest_units, num_bits), axis=-1, dtype=jnp.uint32),
        num_bits,
    )
    is_reached = running.reaches(Mass(goal.high[:, None], goal.low[:, None]))
    is_covered = is_reached[:, -1]
    # sums only grow, so the first that reaches the goal comes after all that do not
    index = jnp.minimum(jnp.sum((~is_reached).astype(jnp.int32), axis=-1), candidates.shape[1] - 1)
    among_candidates = jnp.take_along_axis(candidates, index[:, None], axis=1)[:, 0]
    bits = lax.bitcast_convert_type(distances, jnp.int32)

    def search() -> Float32[Array, "rows"]:
        def holds(middle: Int32[Array, "rows"]) -> Bool[Array, "rows"]:
            return _mass(jnp.where(bits <= middle[:, None], units, jnp.uint32(0)), num_bits).reaches(goal)

        return jnp.where(is_covered, among_candidates, _bisect(holds, top_p))

    found = lax.cond(jnp.any(is_on & ~is_covered), search, lambda: among_candidates)
    return jnp.where(is_on, found, jnp.inf)


def _bisect(
    holds: Callable[[Int32[Array, "rows"]], Bool[Array, "rows"]], like: Array
) -> Float32[Array, "rows"]:
    """The smallest distance whose bits satisfy a monotone predicate; infinity where none does.

    Floats of 0 and more are ordered like their bits, so 31 halvings settle it for good.
    """

    def halve(
        _: Int32[Array, ""], span: tuple[Int32[Array, "rows"], Int32[Array, "rows"]]
    ) -> tuple[Int32[Array, "rows"], Int32[Array, "rows"]]:
        below, found = span
        middle = below + ((found - below) >> 1)
        is_held = holds(middle)
        return jnp.where(is_held, below, middle), jnp.where(is_held, middle, found)

    span = jnp.full_like(like, -1, dtype=jnp.int32), jnp.full_like(like, INFINITY_BITS, dtype=jnp.int32)
    return lax.bitcast_convert_type(lax.fori_loop(0, 31, halve, span)[1], jnp.float32)


def _units(weights: Float32[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Weights (0 to 1) as integers below 2**(2 * limb_bits)."""
    one = 2.0 ** (2 * limb_bits(weights.shape[1]))
    return jnp.minimum(weights * jnp.float32(one), jnp.float32(one * (1 - 2.0**-24))).astype(jnp.uint32)


def _low(units: UInt32[Array, "*entries"], num_bits: int) -> UInt32[Array, "*entries"]:
    return units & jnp.uint32((1 << num_bits) - 1)


def _carry(high: UInt32[Array, "*rows"], low: UInt32[Array, "*rows"], num_bits: int) -> Mass:
    return Mass(high + (low >> num_bits), _low(low, num_bits))


def _mass(units: UInt32[Array, "rows vocab"], num_bits: int) -> Mass:
    """The exact sum of each row, as one reduction over both halves (CPUs run it five times as fast as two)."""
    zero = jnp.uint32(0)
    high, low = lax.reduce(
        (units >> num_bits, _low(units, num_bits)), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,)
    )
    return _carry(high, low, num_bits)


def _share(mass: Mass, top_p: Float32[Array, "rows"], num_bits: int) -> Mass:
    """top_p of a mass, at least one unit."""
    one = jnp.float32(2**num_bits)
    share = top_p * (mass.high.astype(jnp.float32) * one + mass.low.astype(jnp.float32))
    high = jnp.floor(share / one)
    low = jnp.floor(share - high * one).astype(jnp.uint32)
    high_units = high.astype(jnp.uint32)
    return Mass(high_units, jnp.where((high_units == 0) & (low == 0), jnp.uint32(1), low))
