"""What a beam search is to engine and scheduler: parameters of the sampler, settings, and what ends a beam's text."""

from collections.abc import Sequence

from jaxpaged.core.request import BeamSettings, FinishReason, Request
from jaxpaged.core.request import Sequence as Beam
from jaxpaged.core.searches import EndFinder, Ending
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.grammars import Grammars
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

SPARE_TOKENS = 16
"""Tokens decoded with those that a stop string may be spread over, as some have no text."""


def sampling_params_of(params: BeamSearchParams) -> SamplingParams:
    """What every row of a beam asks of its logits."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        logit_bias=params.logit_bias,
        bad_words=params.bad_words,
        allowed_token_ids=params.allowed_token_ids,
        structured_outputs=params.structured_outputs,
        logits_processors=params.logits_processors,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def beam_settings(params: BeamSearchParams, num_stop_tokens: int) -> BeamSettings:
    """As many candidates as transformers looks at, which no number of stop tokens among them can use up."""
    return BeamSettings(
        width=params.beam_width,
        length_penalty=float(params.length_penalty),
        early_stopping=params.early_stopping,
        num_candidates=max(2, 1 + num_stop_tokens) * params.beam_width,
    )


def end_finder(tokenizer: Tokenizer | None, grammars: Grammars) -> EndFinder:
    """A stop string, or the end of the grammar: what ends a beam besides stop tokens and its length."""

    def find_end(parent: Beam, token_id: int) -> Ending | None:
        params = parent.request.params
        if params.stop and tokenizer is not None:
            found = _find_stop_string(tokenizer, parent.request, [*parent.output_token_ids, token_id])
            if found is not None:
                return FinishReason.STOP, found
        if params.structured_outputs is not None and grammars.is_at_end_after(parent, token_id):
            return FinishReason.STOP, None
        return None

    return find_end


def _find_stop_string(tokenizer: Tokenizer, request: Request, output_token_ids: Sequence[int]) -> str | None:
    """The stop string that the last token completes; earlier ones were looked at when they came."""
    stop = tuple(request.params.stop or ())
    num_tail = max(map(len, stop)) + SPARE_TOKENS
    before = [*request.prompt_token_ids, *output_token_ids[:-num_tail]]
    tail = output_token_ids[-num_tail:]
    # most tokens complete none, and one decoding tells
    text = tokenizer.decode(list(tail), skip_special_tokens=False)
    if not any(string in text or text.endswith("\ufffd") for string in stop):
        return None
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=before, stop=stop)
    for token_id in tail:
        detokenizer.append(token_id)
    return detokenizer.stop_reason
