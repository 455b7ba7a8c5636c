"""Record what transformers computes for the cases of tiny_checkpoints (needs torch: the parity extra).

    python tests/llama_goldens.py

writes goldens/llama.npz: per case the logits of its tokens, and the rotary frequencies with their attention factor.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import tiny_checkpoints

GOLDENS = Path(__file__).parent / "goldens" / "llama.npz"


def compute(case: str) -> dict[str, np.ndarray]:
    """Return what transformers computes for the case.

    Logits [tokens, vocab] in float32 and with everything rounded to bfloat16, frequencies [head_dim / 2], attention
    factor.
    """
    import torch  # noqa: PLC0415  (optional extra)
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    token_ids = torch.tensor(tiny_checkpoints.tokens(case)[None].astype(np.int64))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny_checkpoints.write_case(Path(folder), case)
        load = functools.partial(LlamaForCausalLM.from_pretrained, folder, attn_implementation="eager")
        model = load(dtype=torch.float32)
        rotary = model.model.rotary_emb
        return {
            "logits": model(token_ids, use_cache=False).logits[0].numpy(),
            "bfloat16_logits": load(dtype=torch.bfloat16)(token_ids, use_cache=False).logits[0].float().numpy(),
            "frequencies": rotary.inv_freq.numpy(),
            "attention_factor": np.float64(rotary.attention_scaling),
        }


def read(case: str) -> dict[str, np.ndarray]:
    """Return what was recorded for the case."""
    with np.load(GOLDENS, allow_pickle=False) as stored:
        names = ("logits", "bfloat16_logits", "frequencies", "attention_factor")
        return {name: stored[f"{case}.{name}"] for name in names}


if __name__ == "__main__":
    np.savez_compressed(
        GOLDENS,
        **{f"{case}.{name}": array for case in tiny_checkpoints.CASES for name, array in compute(case).items()},
    )
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes, {len(tiny_checkpoints.CASES)} cases")
