"""Chat: every turn sends the whole conversation again, and only what is new of it is computed.

    python -m bench.examples.chat
"""

from bench.examples.saving import main
from jaxpaged import LLM, RequestOutput, SamplingParams

TURNS = ["Once upon a time there was a little dog named Max.", "Then a cat came to play.",
         "They found a big box in the garden.", "What was in the box?", "Mom called them home."]  # fmt: skip


def converse(llm: LLM, is_shared: bool) -> list[RequestOutput]:
    """The output of every turn. The history is kept as token ids, so that the cache meets exactly what it has seen."""
    del is_shared
    history: list[int] = []
    outputs = []
    for turn in TURNS:
        history += llm.get_tokenizer().encode(turn, add_special_tokens=False)
        (output,) = llm.generate({"prompt_token_ids": history},
                                 SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), use_tqdm=False)
        outputs.append(output)
        history += output.outputs[0].token_ids
    return outputs


if __name__ == "__main__":
    main(converse, __doc__ or "")
