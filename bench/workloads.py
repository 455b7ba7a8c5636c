"""Seeded workloads: the requests every engine under test is given, the same for all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_LEN, MAX_LEN = 4, 512
"""Clip of prompt and output lengths; the two together fit a model of 1024 positions."""
PAPER_MEANS = {"ShareGPT-like": (161, 338), "Alpaca-like": (19, 58)}
"""Mean prompt and output lengths of the requests in the paper's evaluation (Kwon et al. 2023, figure 11)."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """A prompt and the number of tokens to generate, forced: no end-of-sequence token ends it earlier."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


def lognormal_lens(
    rng: np.random.Generator, num: int, mean: float, *, sigma: float = 1.0, longest: int = MAX_LEN
) -> list[int]:
    """`num` log-normal lengths clipped to [MIN_LEN, longest], scaled so that their mean after clipping is `mean`."""
    if not MIN_LEN <= mean <= longest / 2:
        raise ValueError(f"mean={mean} is not reachable: it must be from {MIN_LEN} to {longest // 2}")
    shape = np.exp(sigma * rng.standard_normal(num))
    low, high = 0.0, 1e6
    for _ in range(80):  # the clipped mean grows with the scale
        middle = (low + high) / 2
        if np.clip(middle * shape, MIN_LEN, longest).mean() < mean:
            low = middle
        else:
            high = middle
    return [int(length) for length in np.clip(np.rint(high * shape), MIN_LEN, longest)]


def paper_lens(
    rng: np.random.Generator, num: int, lengths: str, *, longest: int = MAX_LEN
) -> list[tuple[int, int]]:
    """(prompt, output) lengths of `num` requests with the means that `lengths` names in PAPER_MEANS."""
    prompt_mean, output_mean = PAPER_MEANS[lengths]
    prompt_lens = lognormal_lens(rng, num, prompt_mean, longest=longest)
    return list(zip(prompt_lens, lognormal_lens(rng, num, output_mean, longest=longest), strict=True))


def sharegpt_like(
    *, num_requests: int = 64, vocab_size: int, prompt_mean: float = 160, output_mean: float = 180, seed: int = 0
) -> list[BenchRequest]:
    """Requests with the long-tailed lengths of chat logs and uniform random prompt tokens, all at time 0.

    Tokens are drawn from 3 upwards (0 to 2 are unknown, begin and end in Llama's vocabulary), so no two prompts share
    a prefix: this workload measures batching and paging, not prefix caching.
    """
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests} must be 1 or more")
    rng = np.random.default_rng(seed)
    prompt_lens = lognormal_lens(rng, num_requests, prompt_mean)
    output_lens = lognormal_lens(rng, num_requests, output_mean)
    return [
        BenchRequest(
            prompt_token_ids=tuple(rng.integers(3, vocab_size, prompt_len).tolist()), max_tokens=output_len
        )
        for prompt_len, output_len in zip(prompt_lens, output_lens, strict=True)
    ]


def static_batches(requests: Sequence[BenchRequest], batch_size: int, *, is_sorted: bool) -> list[list[int]]:
    """Indices of the requests of each static batch, in arrival order or sorted by output length, longest first.

    Sorting by output length is an oracle (a server does not know it) and the best case of static batching: a batch
    runs until its longest output is done.
    """
    order = list(range(len(requests)))
    if is_sorted:
        order.sort(key=lambda index: (-requests[index].max_tokens, -len(requests[index].prompt_token_ids), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
