"""Live comparison with transformers: the recorded goldens are still what it computes."""

import numpy as np
import pytest
import tiny_checkpoints
from llama_goldens import compute, read
from tiny_checkpoints import CASES, MAX_MODEL_LEN, empty_kv, run_dense

from converters import load_huggingface

pytestmark = [
    pytest.mark.parity,
    # torch and transformers warn of their own affairs
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_is_recorded_and_so_do_we(tmp_path, case):
    pytest.importorskip("torch", reason="the parity extra is not installed")
    live, recorded = compute(case), read(case)
    for name in ("logits", "frequencies", "attention_factor"):
        # another build of torch sums in another order
        np.testing.assert_allclose(live[name], recorded[name], atol=1e-5, rtol=1e-6, err_msg=name)
    config, model = load_huggingface(
        tiny_checkpoints.write_case(tmp_path / "model", case), max_model_len=MAX_MODEL_LEN.get(case)
    )
    token_ids = tiny_checkpoints.tokens(case)
    logits, _ = run_dense(model, token_ids, 0, empty_kv(config, len(token_ids)))
    # float32 sums in another order
    np.testing.assert_allclose(logits, live["logits"], atol=1e-4, rtol=0)
