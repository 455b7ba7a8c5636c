"""Retrieval: many questions about one long text, whose keys and values are computed and kept once.

    python -m bench.examples.retrieval
"""

from bench.examples.saving import main
from jaxpaged import LLM, RequestOutput, SamplingParams

TEXT = " ".join(
    f"On day {day} Lily and Tom went to the {place}. They saw a {thing} and were very happy."
    for day, (place, thing) in enumerate(
        [("park", "red bird"), ("lake", "little fish"), ("farm", "brown cow"), ("forest", "tall tree"),
         ("beach", "white shell"), ("shop", "blue toy"), ("school", "big book"), ("garden", "yellow flower")], 1
    )
)  # fmt: skip
QUESTIONS = ["What did Lily see first?", "What did Tom like best?", "Where was the cow?", "Who was happy?",
             "What was blue?", "What came after the lake?"]  # fmt: skip


def answer(llm: LLM, is_shared: bool) -> list[RequestOutput]:
    """Answers to all questions, the text standing before each of them; the prefix cache finds it."""
    del is_shared
    prompts = [f"{TEXT}\n{question} " for question in QUESTIONS]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)


if __name__ == "__main__":
    main(answer, __doc__ or "")
