"""The laws: what must hold whatever the batch, the pool, the block size or the fate of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Run, finish, make_engine, random_prompts, run, tiny_model

from jaxpaged.sampling_params import SamplingParams

LENGTHS = (5, 17, 8, 30, 1, 16, 9, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=7, max_tokens=24, logprobs=2)
SAMPLES = SamplingParams(temperature=1.0, n=3, seed=11, max_tokens=16, logprobs=2)
KINDS = {"greedy": GREEDY, "seeded": SEEDED, "n3": SAMPLES}
TIGHT = 17
"""Blocks of 8 tokens, the null block included: holds the largest of the requests and little more."""


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(5, LENGTHS)


@pytest.fixture(scope="module")
def invariant_ample(model, prompts) -> dict[str, Run]:
    return {
        kind: run(make_engine(model, batch_invariant=True), prompts, params) for kind, params in KINDS.items()
    }


def assert_equal_bits(left: Run, right: Run) -> None:
    assert left.token_ids == right.token_ids
    assert left.logprobs == right.logprobs


def assert_equal_or_near_tie(left: Run, right: Run) -> int:
    """Tokens equal, or first different at a near tie (top-2 margin under 1e-4); returns the number of near ties."""
    num_ties = 0
    for one, other in zip(left.outputs, right.outputs, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            for entry, found in zip(a.logprobs, b.logprobs, strict=True):
                if entry.token_id != found.token_id:
                    assert entry.top[0][1] - entry.top[1][1] < 1e-4, "tokens differ at a wide margin"
                    num_ties += 1
                    break
                assert abs(entry.logprob - found.logprob) < 1e-4
    return num_ties


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pressure_changes_no_bit(model, prompts, invariant_ample, kind, preemption, run_ahead):
    engine = make_engine(
        model, batch_invariant=True, num_device_blocks=TIGHT, preemption=preemption, run_ahead=run_ahead
    )
    if preemption == "auto":
        engine.warm_up_preemption()
    tight = run(engine, prompts, KINDS[kind])
    # it met what it tests
    assert tight.stats.num_preemptions > 0
    if preemption == "swap":
        assert tight.stats.num_swapped_out_blocks > 0
        assert tight.stats.num_recompute_preemptions == 0
    if preemption == "recompute":
        assert tight.stats.num_recompute_preemptions > 0
        assert tight.stats.num_swapped_out_blocks == 0
    assert_equal_bits(tight, invariant_ample[kind])


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_pressure_changes_no_bit_of_a_quantized_cache(model, prompts, kv_cache_dtype, preemption):
    options = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype}
    ample = run(make_engine(model, **options), prompts, GREEDY)
    tight = run(make_engine(model, **options, num_device_blocks=TIGHT, preemption=preemption), prompts, GREEDY)
    assert tight.stats.num_preemptions > 0
    assert_equal_bits(tight, ample)


@pytest.mark.parametrize(("kv_cache_dtype", "bound"), [("int8", 0.1), ("fp8", 0.2)])
def test_a_quantized_cache_changes_logprobs_little(model, prompts, kv_cache_dtype, bound):
    """Until the first token that differs, where the best two were near. The most was 0.066 in int8, 0.117 in fp8."""
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2, prompt_logprobs=0)
    exact = run(make_engine(model), prompts, params)
    engine = make_engine(model, kv_cache_dtype=kv_cache_dtype)
    rounded = run(engine, prompts, params)
    bytes_of = {key: made.memory_plan.block_bytes for key, made in (("q", engine), ("f", make_engine(model)))}
    # heads of 8 lanes: 8 bytes and a scale of 4 in place of 32
    assert bytes_of["q"] * 32 == bytes_of["f"] * 12
    differences = []
    for one, other in zip(exact.outputs, rounded.outputs, strict=True):
        for entry, found in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            differences.append(abs(entry.logprob - found.logprob))
        (a,), (b,) = one.outputs, other.outputs
        for entry, found in zip(a.logprobs, b.logprobs, strict=True):
            if entry.token_id != found.token_id:
                assert entry.top[0][1] - entry.top[1][1] < 2 * bound, "tokens differ at a wide margin"
                break
            differences.append(abs(entry.logprob - found.logprob))
    assert len(differences) > 150
    assert 0 < max(differences) < bound


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pressure_changes_no_token_by_default(model, prompts, kind, preemption):
    ample = run(make_engine(model), prompts, KINDS[kind])
    tight = run(make_engine(model, num_device_blocks=TIGHT, preemption=preemption), prompts, KINDS[kind])
    assert tight.stats.num_preemptions > 0
    num_ties = assert_equal_or_near_tie(ample, tight)
    print(f"near ties: {num_ties}")
    assert num_ties == 0  # this seed has wide margins


@pytest.mark.parametrize("block_size", [4, 8, 32])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_company_and_block_size_change_no_bit(model, prompts, invariant_ample, kind, block_size):
    engine = make_engine(model, batch_invariant=True, block_size=block_size, num_device_blocks=512)
    together = run(engine, prompts, KINDS[kind])
    assert_equal_bits(together, invariant_ample[kind])
    if block_size == 8:
        for index in (1, 3, 7):
            alone = run(make_engine(model, batch_invariant=True), [prompts[index]], KINDS[kind])
            assert alone.token_ids[0] == together.token_ids[index]
            assert alone.logprobs[0] == together.logprobs[index]


def test_company_changes_no_token_by_default(model, prompts):
    together = run(make_engine(model), prompts, GREEDY)
    alone = [run(make_engine(model), [prompt], GREEDY) for prompt in prompts]
    solo = Run(tuple(one.outputs[0] for one in alone), alone[0].stats)
    assert assert_equal_or_near_tie(solo, together) == 0  # this seed has wide margins


@pytest.mark.parametrize("run_ahead", [True, False])
def test_the_next_step_may_be_scheduled_before_the_last_is_read(model, prompts, run_ahead, invariant_ample):
    got = run(make_engine(model, batch_invariant=True, run_ahead=run_ahead), prompts, GREEDY)
    assert_equal_bits(got, invariant_ample["greedy"])


@pytest.mark.parametrize("chunk", [8, 13, 64])
def test_how_a_prompt_is_cut_changes_no_token(model, prompts, chunk):
    whole = run(make_engine(model), prompts, GREEDY)
    cut = run(make_engine(model, max_num_batched_tokens=chunk), prompts, GREEDY)
    assert assert_equal_or_near_tie(whole, cut) == 0


def poison(engine) -> None:
    """Everything in the cache that nobody owns becomes NaN (the bits of NaN, for integer storage)."""
    owned = set()
    for live in engine._live.values():
        for sequence in live.group.sequences:
            owned.update(set(sequence.block_ids) - {0})
    is_spare = jnp.array([block not in owned for block in range(engine.memory_plan.num_device_blocks)])

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            value = jnp.array(np.nan, leaf.dtype)
        else:  # of a quantized cache, whose bytes are never NaN, the largest
            value = leaf.dtype.type(0x7E if leaf.dtype.itemsize == 1 else 0x7FC1)
        return jnp.where(is_spare.reshape(-1, *[1] * (leaf.ndim - 1)), value, leaf)

    engine.runner._kv = jax.tree.map(fill, engine.runner._kv)


each_dtype = pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("float32", "fp8"), ("float32", "int8")]
)


@each_dtype
def test_poisoned_blocks_reach_nobody(prompts, dtype, kv_cache_dtype):
    model = tiny_model(seed=3, dtype=dtype)
    options = {"num_device_blocks": TIGHT, "kv_cache_dtype": kv_cache_dtype}
    clean = run(make_engine(model, **options), prompts, GREEDY)
    engine = make_engine(model, **options, run_ahead=False, enable_prefix_caching=False)
    ids = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    finished = {}
    while engine.has_unfinished:
        poison(engine)
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    poisoned = Run(tuple(finished[i] for i in ids), engine.stats())
    assert poisoned.stats.num_swapped_out_blocks > 0
    assert all(c.finish_reason == "length" for output in poisoned.outputs for c in output.outputs)
    assert poisoned.token_ids == clean.token_ids


@each_dtype
def test_swapping_out_and_in_is_bit_exact(dtype, kv_cache_dtype):
    engine = make_engine(tiny_model(seed=1, dtype=dtype), kv_cache_dtype=kv_cache_dtype)
    run(engine, random_prompts(1, (40, 33)), GREEDY)  # fills blocks with keys and values
    runner = engine.runner
    from jaxpaged.core.scheduler_output import BlockCopy  # noqa: PLC0415  beside its only use

    before = [np.asarray(leaf[1:10]).copy() for leaf in jax.tree.leaves(runner._kv)]
    assert any(block.any() for block in before)
    runner._mover.swap_out(runner._kv, [BlockCopy(i, 11 - i) for i in range(1, 10)])
    runner._kv = jax.tree.map(lambda leaf: leaf.at[1:10].set(jnp.zeros((), leaf.dtype)), runner._kv)
    runner._kv = runner._mover.swap_in(runner._kv, [BlockCopy(11 - i, i) for i in range(1, 10)])
    after = [np.asarray(leaf[1:10]) for leaf in jax.tree.leaves(runner._kv)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.view(np.uint8), new.view(np.uint8))


def test_nothing_compiles_after_warm_up(model, prompts):
    engine = make_engine(model, num_device_blocks=TIGHT)
    engine.warm_up(engine.runner.shapes.buckets.all)
    engine.warm_up_preemption()
    mixed = [GREEDY, SEEDED, SAMPLES, SamplingParams(temperature=0.5, seed=1, repetition_penalty=1.2, max_tokens=9),
             SamplingParams(temperature=0, logit_bias={3: 5.0}, max_tokens=5),
             SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=5),
             SamplingParams(temperature=0, allowed_token_ids=[1, 2, 3], max_tokens=5),
             SamplingParams(temperature=0, stop_token_ids=[7], min_tokens=4, max_tokens=8)]
    got = run(engine, prompts, mixed)
    assert got.stats.num_preemptions > 0
    assert got.stats.num_compiles_after_warmup == 0


def test_a_compile_after_warm_up_is_counted(model):
    engine = make_engine(model, block_size=64)  # a shape that no other test has compiled
    run(engine, [[1, 2, 3]], GREEDY)
    assert engine.stats().num_compiles_after_warmup > 0


@pytest.mark.parametrize("run_ahead", [True, False])
def test_every_request_ends_once_whatever_happens(model, run_ahead):
    rng = np.random.default_rng(0)
    engine = make_engine(model, num_device_blocks=TIGHT, run_ahead=run_ahead, scheduling_policy="priority")
    ended: dict[str, str] = {}
    live: set[str] = set()
    accepted = 0
    for step in range(150):
        if step < 100 and rng.random() < 0.4:
            params = SamplingParams(
                temperature=float(rng.integers(0, 2)),
                n=int(rng.integers(1, 4)),
                max_tokens=int(rng.integers(1, 20)),
                stop_token_ids=rng.integers(0, 199, 12).tolist(),
            )
            prompt = rng.integers(0, 199, int(rng.integers(1, 40))).tolist()
            live.add(engine.add_request(prompt, params, priority=int(rng.integers(0, 3))))
            accepted += 1
        if live and rng.random() < 0.1:
            engine.abort(sorted(live)[int(rng.integers(0, len(live)))])
        for output in engine.step():
            assert output.finished
            assert output.request_id not in ended
            ended[output.request_id] = output.outputs[0].finish_reason
            live.discard(output.request_id)
        engine.scheduler.check()
    for request_id, output in finish(engine).items():
        assert request_id not in ended
        ended[request_id] = output.outputs[0].finish_reason
    assert len(ended) == accepted
    assert set(ended.values()) >= {"stop", "length", "abort"}
    assert engine.stats().num_preemptions > 0
