"""When requests are sent: a Poisson process, a burstier or steadier one, or all at once."""

import math

import numpy as np


def arrival_times(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds from the beginning of the run, the first 0, at `rate` requests a second on average; inf is all at once.

    Gaps are gamma distributed with shape `burstiness` (as `vllm bench serve` has it): 1 makes a Poisson process,
    less makes bursts, more makes arrivals steadier. The rate that came of it is told in the result, not forced.
    """
    if math.isinf(rate):
        return [0.0] * num
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), num - 1)
    return [0.0, *np.cumsum(gaps).tolist()]
