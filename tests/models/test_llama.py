"""Llama's logits are those of transformers; its layers are traced once; its steps are consistent."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
from flax import nnx
from llama_goldens import read
from tiny_checkpoints import CASES, MAX_MODEL_LEN, dense_attention, empty_kv, run_dense

from converters import load_huggingface
from jaxpaged.models.config import ModelConfig
from jaxpaged.models.random_model import random_model
from pallas_kernels import linear

TINY = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=40, model_dim=16, mlp_dim=24, num_layers=5, num_q_heads=4,
    num_kv_heads=2, head_dim=4, max_position_embeddings=32, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True,
    dtype="float32",
)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    folder = tiny_checkpoints.write_case(tmp_path / "model", case)
    config, model = load_huggingface(folder, max_model_len=MAX_MODEL_LEN.get(case))
    token_ids = tiny_checkpoints.tokens(case)
    logits, _ = run_dense(model, token_ids, 0, empty_kv(config, len(token_ids)))
    golden = read(case)["logits"]
    assert golden.std() > 0.5  # there is something to get wrong
    # float32 sums in another order
    np.testing.assert_allclose(logits, golden, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if "rope" in str(CASES[case]) and case != "dynamic_within"])
def test_the_goldens_would_notice_a_missing_rope_scaling(tmp_path, case):
    values = tiny_checkpoints.hf_config(case)
    for name in ("rope_scaling", "rope_parameters", "original_max_position_embeddings"):
        values.pop(name, None)
    folder = tiny_checkpoints.write_folder(tmp_path / "model", values, tiny_checkpoints.weights(values))
    config, model = load_huggingface(folder)
    token_ids = tiny_checkpoints.tokens(case)
    logits, _ = run_dense(model, token_ids, 0, empty_kv(config, len(token_ids)))
    assert np.abs(logits - read(case)["logits"]).max() > 1e-2


def test_greedy_tokens_of_a_trained_model_are_those_of_transformers(stories260k):
    config, model = load_huggingface(stories260k)
    assert config.eos_token_ids == (1, 2)
    for golden in json.loads((stories260k / "golden.json").read_text())["greedy"]:
        prompt, expected = golden["prompt_token_ids"], golden["greedy_token_ids"]
        # fed with the expected tokens, every next one is the most likely: so greedy decoding gives them all
        fed = np.array(prompt + expected[:-1], np.int32)
        logits, _ = run_dense(model, fed, 0, empty_kv(config, 512))
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == expected


def test_greedy_decoding_token_by_token_tells_the_same_story(stories260k):
    config, model = load_huggingface(stories260k)
    golden = json.loads((stories260k / "golden.json").read_text())["greedy"][0]
    kv = empty_kv(config, 512)
    known = list(golden["prompt_token_ids"])
    logits, kv = run_dense(model, np.array(known, np.int32), 0, kv)
    for expected in golden["greedy_token_ids"][:30]:
        known.append(int(logits[-1].argmax()))
        assert known[-1] == expected
        logits, kv = run_dense(model, np.array(known[-1:], np.int32), len(known) - 1, kv)


def test_one_step_over_all_tokens_equals_steps_over_parts():
    model = random_model(TINY, 0)
    token_ids = np.arange(12, dtype=np.int32)
    whole, _ = run_dense(model, token_ids, 0, empty_kv(TINY, 12))
    kv = empty_kv(TINY, 12)
    first, kv = run_dense(model, token_ids[:7], 0, kv)
    second, _ = run_dense(model, token_ids[7:], 7, kv)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-5)


def test_a_layer_is_traced_once_per_step_whatever_the_number_of_layers():
    model = random_model(TINY, 0)
    graph, state = nnx.split(model)
    num_traces = []

    def counting_attention(*arguments, **options):
        num_traces.append(1)
        return dense_attention(*arguments, **options)

    @jax.jit
    def step(state, token_ids, kv):
        return nnx.merge(graph, state)(token_ids, jnp.arange(token_ids.shape[0]), kv, jnp.int32(0), counting_attention)

    for num_tokens in (4, 6):
        step(state, jnp.zeros(num_tokens, jnp.int32), empty_kv(TINY, 8))
    assert TINY.num_layers == 5
    assert len(num_traces) == 2  # once per bucket

    # and lowered once: the program calls one inner function five times
    text = step.lower(state, jnp.zeros(4, jnp.int32), empty_kv(TINY, 8)).as_text()
    assert text.count("func.func private @apply_layer") == 1
    assert text.count("call @apply_layer") == TINY.num_layers


@pytest.mark.parametrize("rows", [[11], [3, 0, 3], list(range(11, -1, -1)), [5] * 13])
def test_the_states_of_some_tokens_are_theirs_among_all(rows):
    """Fewer than the tokens (the last layer computes those alone), as many, more; the caches hold all tokens."""
    model = random_model(TINY, 0)
    inputs = (jnp.arange(12), jnp.arange(12))
    whole, whole_kv = model(*inputs, empty_kv(TINY, 12), jnp.int32(0), dense_attention)
    some, some_kv = model(*inputs, empty_kv(TINY, 12), jnp.int32(0), dense_attention, jnp.array(rows))
    np.testing.assert_allclose(some, whole[np.array(rows)], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, some_kv, whole_kv)


def test_the_last_layer_computes_its_output_for_the_wanted_tokens_only(monkeypatch):
    products = []

    def counting_linear(inputs, kernel):
        products.append(inputs.shape[0])
        return linear(inputs, kernel)

    monkeypatch.setattr("jaxpaged.layers.linear.linear", counting_linear)
    model = random_model(TINY, 0)
    kv, start, rows = empty_kv(TINY, 31), jnp.int32(0), jnp.arange(7)
    model(jnp.zeros(31, jnp.int32), jnp.arange(31), kv, start, dense_attention, rows)
    # traced once for all layers but the last, then for it: query, key and value of all tokens, four products of the 7
    assert products == [31] * 7 + [31] * 3 + [7] * 4


def test_layer_caches_are_updated_in_place_when_donated():
    model = random_model(TINY, 0)
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnames="kv")
    def step(state, token_ids, kv):
        return nnx.merge(graph, state)(token_ids, jnp.arange(token_ids.shape[0]), kv, jnp.int32(0), dense_attention)

    kv = empty_kv(TINY, 4096)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kv))
    analysis = step.lower(state, jnp.zeros(4, jnp.int32), kv).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == num_bytes


@pytest.mark.parametrize("case", ["gqa_tied", "biases", "llama3"])
def test_a_bfloat16_model_errs_no_more_than_transformers_in_bfloat16(tmp_path, case):
    config, model = load_huggingface(tiny_checkpoints.write_case(tmp_path / "model", case), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    token_ids = tiny_checkpoints.tokens(case)
    logits, _ = run_dense(model, token_ids, 0, empty_kv(config, len(token_ids)))
    assert logits.dtype == np.float32

    def error(computed: np.ndarray) -> float:
        return float(np.sqrt(np.mean((computed - read(case)["logits"]) ** 2)))

    assert error(logits) <= error(read(case)["bfloat16_logits"])


def test_the_layers_of_a_model_share_one_graph():
    model = random_model(TINY, 0)
    assert len({hash(nnx.split(layer)[0]) for layer in model.layers}) == 1


def test_random_weights_depend_on_the_seed_alone():
    leaves = [jax.tree.leaves(nnx.state(random_model(TINY, seed))) for seed in (3, 3, 4)]
    assert all(jnp.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not any(jnp.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))
    assert all(float(jnp.std(leaf)) > 0.01 for leaf in leaves[0])  # none is constant
