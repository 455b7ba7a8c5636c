"""The door: a request that could never finish here is refused before it waits."""

from dataclasses import dataclass
from typing import Protocol

from jaxpaged.core.request import Request, SequenceGroup
from jaxpaged.core.table_layout import TableLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What one step and one request may take at most."""

    max_num_seqs: int
    """Rows: sequences that run at once."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    max_model_len: int
    """Prompt and output tokens of one sequence."""
    max_num_logits: int
    """Logit rows of one step."""
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_logits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be 2 or more: one prompt and one output token")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_model_len={self.max_model_len}: "
                f"raise it, or turn enable_chunked_prefill on (without it a prompt goes in one step)"
            )


class AdmissionGate(Protocol):
    """Who may run besides having blocks and rows: how an experiment puts another memory policy over the same engine."""

    def admit(self, group: SequenceGroup) -> bool:
        """Whether the first of those who wait may run now. Asked again for a group that gave way."""

    def leave(self, group: SequenceGroup) -> None:
        """The group has ended, admitted or not."""


def num_worst_case_blocks(request: Request, limits: SchedulerLimits, layout: TableLayout) -> int:
    """Most blocks the request can ever hold alone: the full blocks of its prompt once, the rest once per sequence.

    Of layers with a window, what a window and a step take, once per sequence.
    """
    # the last token is never written: nothing comes after it
    num_tokens = min(request.num_prompt_tokens + request.max_tokens, limits.max_model_len) - 1
    num_common = request.num_prompt_tokens // layout.block_size
    per_sequence = layout.most_blocks(num_tokens, limits.max_num_batched_tokens, num_common)
    return layout.num_full_groups * num_common + request.num_sequences * per_sequence


def check_fits(request: Request, limits: SchedulerLimits, num_usable_blocks: int, layout: TableLayout) -> None:
    """Raise ValueError, with both numbers, for a request that could never end by itself."""
    num_prompt, n = request.num_prompt_tokens, request.num_sequences
    name, noun = ("n", "samples") if request.beams is None else ("beam_width", "beams")
    if num_prompt < 1 or request.max_tokens < 1:
        raise ValueError(f"{num_prompt} prompt tokens and max_tokens={request.max_tokens}: both must be 1 or more")
    if num_prompt >= limits.max_model_len:
        raise ValueError(
            f"the prompt has {num_prompt} tokens and the model's length max_model_len is {limits.max_model_len}: "
            f"it must be shorter than that, to leave room for one token of output"
        )
    if n > limits.max_num_seqs:
        raise ValueError(
            f"{name}={n} is above max_num_seqs={limits.max_num_seqs}: ask for fewer {noun}, or load with a larger "
            "max_num_seqs"
        )
    if n > limits.max_num_logits:
        raise ValueError(f"{name}={n} is above max_num_logits={limits.max_num_logits}: ask for fewer {noun}")
    if not limits.enable_chunked_prefill and request.params.prompt_logprobs is not None:
        num_rows = num_prompt - 1 + n
        if num_rows > limits.max_num_logits:
            raise ValueError(
                f"prompt_logprobs of this prompt takes {num_rows} logit rows in one step, but "
                f"max_num_logits={limits.max_num_logits}: shorten the prompt or turn enable_chunked_prefill on"
            )
    num_blocks = num_worst_case_blocks(request, limits, layout)
    if num_blocks > num_usable_blocks:
        raise ValueError(
            f"the request can grow to {num_blocks} blocks of {layout.block_size} tokens ({num_prompt} prompt tokens, "
            f"max_tokens={request.max_tokens}, {name}={n}), but the pool has {num_usable_blocks}: "
            f"shorten the prompt, lower max_tokens or {name}, or give more blocks"
        )
