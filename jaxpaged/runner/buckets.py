"""The only list of compiled shapes: every step is padded to one of these buckets."""

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

    def reachable(self, prompt_lens: list[int], num_samples: int, *, all_logits: bool = False) -> tuple[Bucket, ...]:
        """The buckets that a batch of these prompts can meet, when nothing else runs.

        Args:
            prompt_lens: Tokens of each prompt.
            num_samples: Sequences that may run at once, over all prompts.
            all_logits: Whether a request asks for prompt logprobs (a logit row for each prompt token).
        """
        largest = self.all[-1]
        if all_logits:
            return self.all
        num_seqs = max(min(num_samples, largest.num_seqs), 1)
        if len(prompt_lens) == 1:
            length = prompt_lens[0]
            chunks = {min(length, largest.num_tokens)} | ({length % largest.num_tokens} - {0})
            met = {self.pick(chunk, min(num_seqs, largest.num_logits), 1) for chunk in chunks}
            # samples of one prompt end one by one
            return tuple(sorted(met | {self.pick(k, k, k) for k in range(1, num_seqs + 1)}))
        top = self.pick(min(max(sum(prompt_lens), num_seqs), largest.num_tokens), 1, 1)
        most_logits = max(SMALL, self.pick(num_seqs, num_seqs, num_seqs).num_logits)
        return tuple(
            bucket for bucket in self.all if bucket.num_tokens <= top.num_tokens and bucket.num_logits <= most_logits
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
