"""The laws where layers have windows: they keep a window's blocks only, and nobody's output shows it."""

from typing import Any

import jax
import numpy as np
import pytest
from harness import Run, make_engine, random_prompts, run, tiny_model
from test_laws import assert_equal_bits, poison
from tiny_checkpoints import empty_kv, run_dense

from jaxpaged.core.admission import num_worst_case_blocks
from jaxpaged.engine.engine import Engine
from jaxpaged.models import layer_groups
from jaxpaged.runner.input_batch import unpack
from jaxpaged.sampling_params import SamplingParams
from pallas_kernels import check_metadata

WINDOWS: dict[str, tuple[int | None, ...]] = {"windowed": (11, 11), "alternating": (9, None)}
GREEDY = SamplingParams(temperature=0, max_tokens=30, logprobs=2)
SAMPLES = SamplingParams(temperature=1.0, n=3, seed=11, max_tokens=16, logprobs=2)
KINDS = {"greedy": GREEDY, "n3": SAMPLES}
CHUNK = 16
"""Tokens of a step: prompts come in chunks, and are several windows long."""
PROMPTS = random_prompts(5, (5, 17, 8, 50, 1, 16, 9, 40))
each_model = pytest.mark.parametrize("name", sorted(WINDOWS))


def make(name: str, **options: Any) -> Engine:
    chosen = {"batch_invariant": True, "max_num_batched_tokens": CHUNK, "max_num_seqs": 12} | options
    return make_engine(tiny_model(seed=3, windows=WINDOWS[name]), **chosen)


def tight_pool(engine: Engine, params: SamplingParams) -> int:
    """Blocks, the null block included, that hold the largest of the requests and no more."""
    scheduler, needs = engine.scheduler, []
    for prompt in PROMPTS:
        request = engine._resolve(tuple(prompt), params, "", 0, 0, "")
        needs.append(num_worst_case_blocks(request, scheduler.limits, scheduler.block_manager.layout))
    return max(needs) + 1


@pytest.fixture(scope="module")
def ample() -> dict[tuple[str, str], Run]:
    return {(name, kind): run(make(name), PROMPTS, KINDS[kind]) for name in WINDOWS for kind in KINDS}


@each_model
def test_greedy_tokens_are_those_of_dense_attention(name, ample):
    """Fed with the tokens, dense attention of the windows finds each the most likely."""
    model, config = tiny_model(seed=3, windows=WINDOWS[name])
    plain, _ = tiny_model(seed=3)
    num_different = 0
    for index in (1, 3, 7):
        prompt, (tokens,) = PROMPTS[index], ample[name, "greedy"].token_ids[index]
        fed = np.array([*prompt, *tokens[:-1]], np.int32)
        logits, _ = run_dense(model, fed, 0, empty_kv(config, len(fed)))
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == list(tokens)
        unwindowed, _ = run_dense(plain, fed, 0, empty_kv(config, len(fed)))
        num_different += unwindowed[len(prompt) - 1 :].argmax(-1).tolist() != list(tokens)
    assert num_different == 3, "the windows matter"


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@each_model
def test_pressure_changes_no_bit(name, kind, preemption, run_ahead, ample):
    num_blocks = tight_pool(make(name), KINDS[kind])
    engine = make(name, num_device_blocks=num_blocks, preemption=preemption, run_ahead=run_ahead)
    tight = run(engine, PROMPTS, KINDS[kind])
    # it met what it tests
    assert tight.stats.num_preemptions > 0
    if preemption == "swap":
        assert tight.stats.num_swapped_in_blocks > 0
        assert tight.stats.num_recompute_preemptions == 0
    assert_equal_bits(tight, ample[name, kind])


@pytest.mark.parametrize("block_size", [4, 32])
@each_model
def test_company_and_block_size_change_no_bit(name, block_size, ample):
    together = run(make(name, block_size=block_size, num_device_blocks=512), PROMPTS, GREEDY)
    assert_equal_bits(together, ample[name, "greedy"])
    for index in (1, 3):
        alone = run(make(name), [PROMPTS[index]], GREEDY)
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[index], together.logprobs[index])


@pytest.mark.parametrize("chunk", [8, 128])
@each_model
def test_how_a_prompt_is_cut_changes_no_token(name, chunk, ample):
    cut = run(make(name, max_num_batched_tokens=chunk, max_num_seqs=8), PROMPTS, GREEDY)
    assert cut.token_ids == ample[name, "greedy"].token_ids  # this seed has wide margins


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_model
def test_poisoned_blocks_reach_nobody(name, dtype):
    """What was let go is NaN at once: its table entries lead there until others write it."""
    model = tiny_model(seed=3, windows=WINDOWS[name], dtype=dtype)
    options = {"max_num_batched_tokens": CHUNK, "batch_invariant": True, "run_ahead": False}
    options |= {"enable_prefix_caching": False}
    num_blocks = tight_pool(make(name), GREEDY)
    clean = run(make_engine(model, **options, num_device_blocks=num_blocks), PROMPTS, GREEDY)
    engine = make_engine(model, **options, num_device_blocks=num_blocks)
    ids = [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
    finished = {}
    while engine.has_unfinished:
        poison(engine)
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    poisoned = Run(tuple(finished[request_id] for request_id in ids), engine.stats())
    assert poisoned.stats.num_swapped_out_blocks > 0
    assert poisoned.token_ids == clean.token_ids
    assert poisoned.logprobs == clean.logprobs


@each_model
def test_a_prefix_hit_across_windows_changes_no_bit(name):
    """A prompt of 50 tokens, then it and longer ones: found, but for the blocks that windows had let go and lost."""
    longer = [PROMPTS[3], PROMPTS[3] + PROMPTS[1], PROMPTS[3] + PROMPTS[7]]
    engine = make(name)
    first = run(engine, [PROMPTS[3]], GREEDY)
    second = run(engine, longer, GREEDY)
    assert [output.num_cached_tokens for output in second.outputs] == [48, 48, 48]
    computed = run(make(name, enable_prefix_caching=False), longer, GREEDY)
    assert [output.num_cached_tokens for output in computed.outputs] == [0, 0, 0]
    assert_equal_bits(second, computed)
    assert first.logprobs[0] == second.logprobs[0]


def step_and_count(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    """Blocks in use after each step of one request."""
    engine.add_request(prompt, params)
    counts = []
    while engine.has_unfinished:
        engine.step()
        if engine.has_unfinished:
            counts.append(engine.stats().num_used_blocks)
    return counts


def test_a_long_sequence_holds_the_blocks_of_its_window():
    """A window of 11 and blocks of 8: a decode touches 11 tokens, so 2 or 3 blocks; a chunk of 16 26, so 4 or 5."""
    params = SamplingParams(temperature=0, max_tokens=70)
    counts = step_and_count(make("windowed"), PROMPTS[3], params)
    assert max(counts[:4]) <= 5
    assert set(counts[-60:]) == {2, 3}, "the last 60 tokens, more than five windows"
    plain = step_and_count(make_engine(tiny_model(seed=3)), PROMPTS[3], params)
    assert plain[-1] == 15  # 119 tokens


def test_an_alternating_model_holds_full_length_for_its_full_layers_alone():
    params = SamplingParams(temperature=0, max_tokens=70)
    engine, plain = make("alternating"), make_engine(tiny_model(seed=3))
    assert 2 * engine.memory_plan.block_bytes == plain.memory_plan.block_bytes, "a block is of one of the two layers"
    counts = step_and_count(engine, PROMPTS[3], params)
    # a window of 9 tokens touches 2 blocks, at most: (15 + 2) blocks of one layer where 15 of two were
    assert counts[-1] in (16, 17)
    assert max(counts) == 17


def test_layers_of_a_group_that_is_not_full_keep_their_places(monkeypatch):
    """Three windowed layers in groups of two: the second has one, and its other slot lies idle."""
    monkeypatch.setattr(layer_groups, "MOST_GROUPS", 3)
    model = tiny_model(seed=4, num_layers=5, windows=(9, None, 9, 9, None))
    engine = make_engine(model, max_num_batched_tokens=CHUNK)
    groups = engine.runner.shapes.groups
    assert (groups.windows, groups.size) == ((9, 9, None), 2)
    assert groups.places == ((0, 0), (2, 0), (0, 1), (1, 0), (2, 1))
    assert len(engine.runner._kv) == 2
    ((tokens,),) = run(engine, [PROMPTS[3]], GREEDY).token_ids
    fed = np.array([*PROMPTS[3], *tokens[:-1]], np.int32)
    logits, _ = run_dense(model[0], fed, 0, empty_kv(model[1], len(fed)))
    assert logits[len(PROMPTS[3]) - 1 :].argmax(-1).tolist() == list(tokens)


def test_what_fits_is_what_windows_keep():
    """Seven blocks: 120 tokens are 15 columns of 8, and the door counts a window and a chunk, 26 tokens, as 5."""
    params = SamplingParams(temperature=0, max_tokens=70)
    engine = make("windowed", num_device_blocks=8)
    assert not engine.can_run_out_of_blocks([engine.add_request(PROMPTS[3], params)])
    with pytest.raises(ValueError, match="can grow to 15 blocks of 8 tokens .* but the pool has 7"):
        make_engine(tiny_model(seed=3), num_device_blocks=8).add_request(PROMPTS[3], params)


def test_a_window_that_no_sequence_outgrows_is_none():
    engine = make_engine(tiny_model(seed=3, windows=(64, None)), max_model_len=64)
    assert engine.runner.shapes.groups.windows == (None,)
    assert make_engine(tiny_model(seed=3, windows=(63, 63)), max_model_len=64).runner.shapes.groups.windows == (63,)


@each_model
def test_every_step_of_a_tight_engine_has_right_tables(name, monkeypatch):
    num_blocks = tight_pool(make(name), SAMPLES)
    engine = make(name, num_device_blocks=num_blocks)
    runner, block_size = engine.runner, engine.config.block_size
    begin, num_gone = runner.begin, 0

    def checked(plan: Any, built: Any) -> Any:
        nonlocal num_gone
        if built is not None:
            batch = unpack(jax.numpy.asarray(built.packed), runner._state.history, built.layout, block_size)
            for window, metadata in zip(runner.shapes.groups.windows, batch.attention.groups, strict=True):
                check_metadata(metadata, num_blocks=num_blocks, block_size=block_size, window=window)
            num_gone += sum(item.sequence.block_ids.count(0) for item in plan.scheduled)
        return begin(plan, built)

    monkeypatch.setattr(runner, "begin", checked)
    assert run(engine, PROMPTS, SAMPLES).stats.num_preemptions > 0
    assert num_gone > 0
