"""What a caller gets back for a request."""

from dataclasses import dataclass

from jaxpaged.core.request import TokenLogprobs


class FailedRequestWarning(UserWarning):
    """Requests of a call ended in an error; the others are complete."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds, and what memory pressure did to it."""

    arrival_time_s: float
    """Wall clock (time.time)."""
    queue_s: float | None
    """From arrival to the first step that computed some of it."""
    prefill_s: float | None
    """From then to its first token."""
    decode_s: float | None
    """From its first token to its last."""
    time_to_first_token_s: float | None
    num_preemptions: int
    num_swapped_blocks: int
    num_shared_blocks: int


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    """Sum of the sampled tokens' log-probabilities, where the request asked for logprobs; of a beam always, with what
    `logit_bias` adds."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One TokenLogprobs per token, where asked for: `token_id`, `logprob` and `rank` of the token that was taken, and
    in `top` the most likely ones as pairs (token id, logprob). vLLM has a dictionary of both by token id."""
    finish_reason: str | None
    """None while running; then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None
    """The stop token or stop string that ended it, or the message of an error."""
    score: float | None = None
    """Of a beam: cumulative_logprob / number of tokens ** length_penalty, by which beams are ordered."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request so far: complete when `finished`."""

    request_id: str
    prompt: str | None
    """None where the prompt came as token ids."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    """One TokenLogprobs per prompt token (the first is None), where asked for; see `CompletionOutput.logprobs`."""
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    metrics: RequestMetrics
