"""Translation: the examples that show the task stand before every sentence, and are computed once.

    python -m bench.examples.translation
"""

from bench.examples.saving import main
from jaxpaged import LLM, RequestOutput, SamplingParams

EXAMPLES = [("The dog is big.", "Le chien est grand."), ("The cat sleeps.", "Le chat dort."),
            ("I see a bird.", "Je vois un oiseau."), ("She has a red ball.", "Elle a une balle rouge."),
            ("We go home.", "Nous rentrons.")]  # fmt: skip
SENTENCES = ["The girl runs.", "He likes the tree.", "The sun is hot.", "I eat an apple.", "They play.", "It is late.",
             "My mom sings.", "The fish swims."]  # fmt: skip


def translate(llm: LLM, is_shared: bool) -> list[RequestOutput]:
    """Translations of all sentences, five examples before each; the prefix cache finds them."""
    del is_shared
    shots = "".join(f"English: {english} French: {french}\n" for english, french in EXAMPLES)
    prompts = [f"{shots}English: {sentence} French:" for sentence in SENTENCES]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)


if __name__ == "__main__":
    main(translate, __doc__ or "")
