"""Record what transformers computes for the cases of families.py (needs torch: the parity extra).

    python tests/family_goldens.py [CASE...]

writes goldens/families/CASE.npz, with the first seed of weights whose greedy choices are all clear.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import numpy as np
from safetensors import safe_open
from tiny_checkpoints import write_folder

LEAST_MARGIN = 2e-3
"""Between the two largest logits wherever a token is chosen; tests allow logits to differ by a twentieth of it."""
LEAST_SPREAD = 0.3
LEAST_DISTINCT = 4
"""Different tokens among the greedy ones of each prompt."""


def tensor_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that transformers saves for a model of this config."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  (torch is an optional extra)

    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), families.config_json(case), {"none": np.zeros(1, np.float32)})
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}


def compute(case: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Return what transformers computes of each prompt: logits [tokens, vocab], greedy tokens; and the least margin."""
    import torch  # noqa: PLC0415  (optional extra)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_folder(Path(folder), families.config_json(case), families.weights(case, shapes, seed))
        # the grouped product that it prefers takes sizes that are multiples of 4 alone
        is_mixture = any("experts" in name for name in shapes)
        options = {"experts_implementation": "eager"} if is_mixture else {}
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True, **options
        )
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert not set(told["missing_keys"]) - tied, told
        assert not told["unexpected_keys"], told
        assert not told["mismatched_keys"], told
        logits, greedy, margins = [], [], []
        for prompt in families.prompts():
            known = list(prompt)
            for step in range(families.NUM_NEW_TOKENS):
                found = model(torch.tensor([known]), use_cache=False).logits[0].numpy()
                if step == 0:
                    logits.append(found)
                best = np.sort(found[-1])
                margins.append(float(best[-1] - best[-2]))
                known.append(int(found[-1].argmax()))
            greedy.append(known[len(prompt) :])
    return {"logits": logits, "greedy": greedy, "least_margin": min(margins)}


def record(case: str) -> None:
    """Write the golden file of a case."""
    shapes = tensor_shapes(case)
    for seed in range(100):
        found = compute(case, shapes, seed)
        spread = min(float(logits.std()) for logits in found["logits"])
        distinct = [len(set(tokens)) for tokens in found["greedy"]]
        if found["least_margin"] > LEAST_MARGIN and spread > LEAST_SPREAD and min(distinct) >= LEAST_DISTINCT:
            break
    else:
        raise ValueError(f"{case}: no seed has clear choices")
    families.GOLDENS.mkdir(exist_ok=True)
    path = families.GOLDENS / f"{case}.npz"
    np.savez_compressed(
        path,
        names=np.array(list(shapes)),
        shapes=np.array([" ".join(map(str, shape)) for shape in shapes.values()]),
        seed=np.int64(seed),
        greedy=np.array(found["greedy"], np.int32),
        **{f"logits{i}": logits for i, logits in enumerate(found["logits"])},
    )
    print(f"{path}: {path.stat().st_size} bytes, seed {seed}, margin {found['least_margin']:.4f}, {distinct} distinct")


if __name__ == "__main__":
    for case in sys.argv[1:] or families.CASES:
        record(case)
