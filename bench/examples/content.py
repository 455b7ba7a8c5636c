"""Content generation: several drafts of one prompt, which is computed once and whose blocks all drafts share.

    python -m bench.examples.content
"""

from bench.examples.saving import main
from jaxpaged import LLM, RequestOutput, SamplingParams

PROMPT = (
    "Once upon a time there was a girl named Lily. She had a red ball, a blue hat and a small brown dog. One sunny day "
    "she took all of them to the park. The dog ran fast, the hat flew away, and the ball"
)
NUM_DRAFTS = 6


def draft(llm: LLM, is_shared: bool) -> list[RequestOutput]:
    """Drafts as samples of one request, or, for comparison, as requests of their own."""
    if is_shared:
        params = SamplingParams(n=NUM_DRAFTS, temperature=0.8, seed=7, max_tokens=32)
        return llm.generate(PROMPT, params, use_tqdm=False)
    params = [SamplingParams(temperature=0.8, seed=7 + index, max_tokens=32) for index in range(NUM_DRAFTS)]
    return llm.generate([PROMPT] * NUM_DRAFTS, params, use_tqdm=False)


if __name__ == "__main__":
    main(draft, __doc__ or "")
