"""The only list of compiled shapes: every step is padded to one of these buckets."""

from collections.abc import Iterable
from dataclasses import dataclass

SMALL = 64
"""Up to this many tokens a bucket has as many logit rows as tokens; above it, logit rows come in two sizes."""
MIN_MIDDLE = 12
"""The least size half-way between two powers of two."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The padded shape of one step."""

    num_tokens: int
    num_logits: int
    num_seqs: int


@dataclass(frozen=True)
class Buckets:
    """Every shape a step may have, smallest first."""

    all: tuple[Bucket, ...]

    @property
    def max_num_logits(self) -> int:
        """Most logit rows a step of any size may ask for; a larger bucket is used where the smaller has fewer."""
        return self.all[-1].num_logits

    def pick(self, num_tokens: int, num_logits: int, num_seqs: int) -> Bucket:
        """The smallest bucket that holds the step."""
        for bucket in self.all:
            if (
                bucket.num_tokens >= num_tokens
                and bucket.num_logits >= num_logits
                and bucket.num_seqs >= num_seqs
            ):
                return bucket
        raise ValueError(f"no bucket holds {num_tokens} tokens, {num_logits} logit rows and {num_seqs} sequences")

    def of_steps(self, steps: Iterable[tuple[int, int, int]], num_decodes: int) -> tuple[Bucket, ...]:
        """Buckets of these steps (tokens, logit rows, sequences), and of decodes of up to `num_decodes` sequences."""
        met = {self.pick(*step) for step in steps}
        return tuple(sorted(met | {self.pick(k, k, k) for k in range(1, min(num_decodes, self.all[-1].num_seqs) + 1)}))

    def up_to(self, num_tokens: int, num_logits: int) -> tuple[Bucket, ...]:
        """The buckets of every step with at most so many tokens and logit rows, or as many as a step may have."""
        largest = self.all[-1]
        num_logits = min(num_logits, largest.num_logits)
        top = self.pick(min(num_tokens, largest.num_tokens), num_logits, 1)
        fewest: dict[int, int] = {}
        for bucket in self.all:
            fewest.setdefault(bucket.num_tokens, bucket.num_logits)
        return tuple(
            bucket
            for bucket in self.all
            if bucket.num_tokens <= top.num_tokens
            # a step meets the bucket of more rows where there are more than the other one has
            and (bucket.num_logits == fewest[bucket.num_tokens] or num_logits > fewest[bucket.num_tokens])
        )


def make_buckets(
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    min_num_tokens: int = 1,
    has_middles: bool = False,
    is_single: bool = False,
) -> Buckets:
    """Powers of two from `min_num_tokens` to `max_num_batched_tokens`; one bucket only if `is_single`.

    `min_num_tokens` is 2 where a one-row matmul is slow (16-bit weights on CPU). `has_middles` adds the sizes half-way
    between, from MIN_MIDDLE on: for devices whose steps take time by the token rather than by the weights they read.
    """
    most_logits = min(max_num_batched_tokens, max(max_num_seqs, SMALL))
    if is_single:
        whole = Bucket(max_num_batched_tokens, most_logits, min(max_num_batched_tokens, max_num_seqs))
        return Buckets((whole,))
    sizes = []
    size = min(min_num_tokens, max_num_batched_tokens)
    while size < max_num_batched_tokens:
        sizes.append(size)
        middle = size + size // 2
        if has_middles and MIN_MIDDLE <= middle < max_num_batched_tokens:
            sizes.append(middle)
        size *= 2
    sizes.append(max_num_batched_tokens)
    found = set()
    for size in sizes:
        for num_logits in {min(size, SMALL), min(size, most_logits)}:
            found.add(Bucket(size, num_logits, min(size, max_num_seqs)))
    return Buckets(tuple(sorted(found)))
