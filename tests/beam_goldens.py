"""Record what transformers' beam search finds for tiny models and the demo model (needs torch: the parity extra).

    python tests/beam_goldens.py

writes goldens/beams.json: for each model and case the hypotheses, best first, as output token ids and score.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_checkpoints

from jaxpaged.llm import DEMO_FOLDER

GOLDENS = Path(__file__).parent / "goldens" / "beams.json"
MODELS = ("mha_untied", "gqa_tied", "demo")
"""Two of tiny_checkpoints, whose texts end by chance, and a trained one."""
MAX_TOKENS = 20
PROMPTS = {
    "mha_untied": [5, 9, 17, 30, 3],
    "gqa_tied": [11, 4, 46],
    "demo": [0, 860, 27, 200, 42, 386, 323],
}
STOP_TOKENS = {"mha_untied": [2, 31], "gqa_tied": [2, 7, 20, 33, 45], "demo": [15, 28, 200]}
"""Those of the requests; the demo's end a sentence, a clause and a line."""


@dataclass(frozen=True)
class Case:
    """One search."""

    width: int
    length_penalty: float
    early_stopping: bool

    def __str__(self) -> str:
        return f"{self.width} beams, penalty {self.length_penalty}, {'early' if self.early_stopping else 'late'}"


CASES = tuple(
    Case(width, penalty, early) for width in range(2, 9) for penalty in (0.0, 0.6, 1.0, 2.0) for early in (False, True)
)


def write_model(folder: Path, name: str) -> Path:
    """A folder with the model that `name` means."""
    return DEMO_FOLDER if name == "demo" else tiny_checkpoints.write_case(folder / name, name)


def compute(name: str) -> Iterator[tuple[str, list[Any]]]:
    """What transformers finds for every case: [token ids, score] of each hypothesis."""
    import torch  # noqa: PLC0415  (optional extra)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    stop = STOP_TOKENS[name]
    prompt = torch.tensor([PROMPTS[name]])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(write_model(Path(folder), name), dtype=torch.float32)
        for case in CASES:
            found = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), num_beams=case.width, num_return_sequences=case.width,
                do_sample=False, length_penalty=case.length_penalty, early_stopping=case.early_stopping,
                max_new_tokens=MAX_TOKENS, eos_token_id=stop, pad_token_id=0, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
            hypotheses = []
            for ids, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
                outputs = ids[prompt.shape[1] :]
                end = next((i + 1 for i, token_id in enumerate(outputs) if token_id in stop), MAX_TOKENS)
                hypotheses.append([outputs[:end], round(score, 7)])
            yield str(case), hypotheses


def read() -> dict[str, dict[str, list[Any]]]:
    """What was recorded, by model and case."""
    return json.loads(GOLDENS.read_text())


if __name__ == "__main__":
    recorded = {name: dict(compute(name)) for name in MODELS}
    GOLDENS.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes")
