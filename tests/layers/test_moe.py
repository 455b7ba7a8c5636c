"""Mixtures of experts: each row through its own expert, and nothing of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_targets import H200, V6E, Device, name_of

from jaxpaged.layers.moe import IMPLEMENTATIONS, Experts, SparseMLP, block_size

RNG = np.random.default_rng(3)


def random_mixture(num_experts=5, per_token=2, model_dim=6, expert_dim=7, *, normalises_weights=True) -> SparseMLP:
    mixture = SparseMLP(
        model_dim, expert_dim, num_experts=num_experts, num_experts_per_token=per_token,
        normalises_weights=normalises_weights, activation="silu", dtype=jnp.float32,
    )
    for parameter in (mixture.router.kernel, mixture.experts.gate, mixture.experts.up, mixture.experts.down):
        parameter[...] = jnp.asarray(RNG.normal(size=parameter.shape), jnp.float32)
    return mixture


def by_hand(experts: Experts, row: np.ndarray, expert: int) -> np.ndarray:
    """One row through one expert, in float64."""
    gate, up, down = (np.asarray(k[expert], np.float64) for k in (experts.gate, experts.up, experts.down))
    gated = gate @ row
    return down @ (gated / (1 + np.exp(-gated)) * (up @ row))


@pytest.mark.parametrize("counts", [[3, 0, 9, 1, 20], [0, 0, 0, 0, 1], [33, 0, 0, 0, 0], [8, 8, 8, 8, 8]])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_row_goes_through_its_own_expert(implementation: str, counts: list[int]) -> None:
    experts = random_mixture().experts
    rows = RNG.normal(size=(sum(counts), 6)).astype(np.float32)
    found = experts(jnp.asarray(rows), jnp.asarray(counts, jnp.int32), implementation)
    owners = np.repeat(np.arange(5), counts)
    expected = [by_hand(experts, row, expert) for row, expert in zip(rows, owners, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_expert_that_nobody_picks_is_not_read() -> None:
    experts = random_mixture().experts
    for kernel in (experts.gate, experts.up, experts.down):
        kernel[...] = kernel[...].at[jnp.array([1, 4])].set(jnp.nan)
    rows = jnp.asarray(RNG.normal(size=(30, 6)), jnp.float32)
    found = experts(rows, jnp.array([9, 0, 1, 20, 0], jnp.int32), "blocks")
    assert bool(jnp.isfinite(found).all())


@pytest.mark.parametrize("normalises_weights", [True, False])
def test_a_token_gets_the_sum_of_its_experts_by_their_probabilities(normalises_weights: bool) -> None:
    mixture = random_mixture(normalises_weights=normalises_weights)
    hidden = RNG.normal(size=(11, 6)).astype(np.float32)
    scores = hidden @ np.asarray(mixture.router.kernel[...], np.float64).T
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = []
    for token, row in enumerate(probabilities):
        best = np.argsort(-row)[:2]
        weights = row[best] / (row[best].sum() if normalises_weights else 1.0)
        expected.append(sum(w * by_hand(mixture.experts, hidden[token], e) for w, e in zip(weights, best, strict=True)))
    np.testing.assert_allclose(mixture(jnp.asarray(hidden)), expected, rtol=1e-4, atol=1e-4)


def test_a_token_gets_the_same_in_any_company() -> None:
    """Blocks of one size: the same products, whatever other rows there are."""
    mixture = random_mixture()
    hidden = jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)
    assert block_size(24, 5) == block_size(2, 5) == 8
    np.testing.assert_array_equal(mixture(hidden)[:1], mixture(hidden[:1]))


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "size"), [(1, 8, 8), (64, 8, 8), (65, 8, 16), (1024, 8, 128), (8192, 8, 128)]
)
def test_a_block_has_about_the_rows_of_an_expert(num_rows: int, num_experts: int, size: int) -> None:
    assert block_size(num_rows, num_experts) == size


SHAPES = (
    jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16),
    jax.ShapeDtypeStruct((16,), jnp.int32),
    tuple(jax.ShapeDtypeStruct((16, *shape), jnp.bfloat16) for shape in ((512, 256), (512, 256), (256, 512))),
)


def test_a_tpu_multiplies_each_row_with_its_own_expert_alone() -> None:
    V6E.skip_if_missing()
    compiled = V6E.compile_for(lambda *inputs: IMPLEMENTATIONS["grouped"](*inputs, jax.nn.silu), *SHAPES)
    needed = 2 * 1024 * 256 * 512 * 3
    assert needed <= compiled.cost_analysis()["flops"] < 1.1 * needed  # dense: 16 times as many


@pytest.mark.parametrize("device", [H200], ids=name_of)
def test_a_gpu_holds_one_block_at_a_time(device: Device) -> None:
    device.skip_if_missing()
    compiled = device.compile_for(lambda *inputs: IMPLEMENTATIONS["blocks"](*inputs, jax.nn.silu), *SHAPES)
    rows, kernel = 1024 * 256 * 2, 512 * 256 * 2
    # rows with one more block twice, one expert's kernels and a block's results; dense has 16 times the rows
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * rows + 4 * kernel
