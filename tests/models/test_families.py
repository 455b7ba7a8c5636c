"""Every architecture: logits and greedy tokens of transformers, from a Hugging Face folder through the paged engine."""

import numpy as np
import pytest
from families import CASES, NUM_NEW_TOKENS, VOCAB_SIZE, golden, prompts, write_family
from harness import finish, make_engine
from tiny_checkpoints import empty_kv, run_dense

from converters import load_huggingface
from converters.architectures import ARCHITECTURES
from jaxpaged.models.registry import MODELS
from jaxpaged.sampling_params import SamplingParams

LONGEST = max(len(prompt) for prompt in prompts())


def logits_of(folder):
    """The logits of each prompt's tokens; all are run at one length, as later tokens change nothing of earlier ones."""
    config, model = load_huggingface(folder, max_model_len=LONGEST + NUM_NEW_TOKENS)
    found = []
    for prompt in prompts():
        padded = np.array(prompt + [0] * (LONGEST - len(prompt)), np.int32)
        logits, _ = run_dense(model, padded, 0, empty_kv(config, LONGEST))
        found.append(logits[: len(prompt)])
    return found


def test_every_architecture_has_cases():
    """Two or more each: grouped and multi-head, tied and untied; this is what the README's last column says."""
    cases = [architecture for architecture, _ in CASES.values()]
    assert set(cases) == set(MODELS) == set(ARCHITECTURES)
    assert min(cases.count(architecture) for architecture in MODELS) >= 2


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_family_are_those_of_transformers(tmp_path, case):
    for computed, recorded in zip(logits_of(write_family(tmp_path, case)), golden(case)["logits"], strict=True):
        assert recorded.std() > 0.3  # there is something to get wrong
        # float32 sums in another order
        np.testing.assert_allclose(computed, recorded, atol=1e-4, rtol=0)


MATTERS = [
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"max_window_layers": 2}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 3.3}),
    ("gemma2", {"query_pre_attn_scalar": 10}),
    ("gemma3", {"rope_local_base_freq": 100.0}),
    ("gemma3", {"rope_scaling": None}),
    ("phi3", {"original_max_position_embeddings": 96}),
    ("smollm3", {"no_rope_layer_interval": 4}),
    ("starcoder2", {"sliding_window": None}),
    ("gptj", {"activation_function": "gelu"}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"rotary_pct": 0.25}),
    ("opt_350m", {"activation_function": "gelu"}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_tied", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
]


@pytest.mark.parametrize(("case", "change"), MATTERS)
def test_the_recorded_logits_would_notice_a_fact_that_is_not_obeyed(tmp_path, case, change):
    computed = logits_of(write_family(tmp_path, case, **change))
    # ten times what the logits of the port may differ by
    assert max(np.abs(c - r).max() for c, r in zip(computed, golden(case)["logits"], strict=True)) > 1e-3


FIRST = {architecture: case for case, (architecture, _) in reversed(CASES.items())}.values()
"""The first case of each architecture; the others go through the engine in the slow tests."""


@pytest.mark.parametrize(
    "case", [case if case in FIRST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_greedy_tokens_of_a_family_are_those_of_transformers_under_chunks_prefix_hits_and_swaps(tmp_path, case):
    config, model = load_huggingface(write_family(tmp_path, case), max_model_len=96)
    # chunks of 16 tokens cut the prompts, and their common 24 tokens are 3 blocks
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "max_model_len": 96}
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    first, *others = prompts()
    longest = max(map(len, (first, *others))) + NUM_NEW_TOKENS
    layout = make_engine((model, config), **options).scheduler.block_manager.layout
    # the longest request fits, and no more: 9 blocks, fewer with windows, and the null block
    engine = make_engine((model, config), num_device_blocks=1 + layout.most_blocks(longest, 16), **options)
    ids = [engine.add_request(first, params)]
    for _ in range(3):  # the first prompt is three chunks, whose blocks the second finds
        engine.step()
    ids += [engine.add_request(prompt, params) for prompt in others]
    finished = finish(engine)
    assert [list(finished[i].outputs[0].token_ids) for i in ids] == golden(case)["greedy"]
    stats = engine.stats()
    assert stats.num_swapped_out_blocks > 0
    assert stats.num_swapped_in_blocks > 0
    assert finished[ids[1]].num_cached_tokens == 24
    assert config.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("case", FIRST)
def test_an_unknown_attribute_is_refused_in_every_family(tmp_path, case):
    folder = write_family(tmp_path, case, logit_twist=2.0)
    with pytest.raises(ValueError, match="config.json: attribute 'logit_twist' .2.0. is not known"):
        load_huggingface(folder)
