"""One LLM, several threads and streams: calls wait for one another, and each gets what it would have got alone."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.engine.engine import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLED = SamplingParams(temperature=1, max_tokens=16, seed=3, n=2)
PROMPTS = ["ROMEO:\n", "KING:\n", "First Citizen:\nWe", "JULIET:\n"]


@pytest.fixture(scope="module")
def demo():
    return LLM("demo", max_num_seqs=4, max_num_batched_tokens=64, show_progress=False)


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def is_idle(llm):
    stats = llm.stats()
    return not llm.engine.has_unfinished and stats.num_used_blocks == 0


def test_threads_get_what_each_would_have_got_alone(demo):
    alone = {
        (prompt, params): tokens(demo.generate(prompt, params, use_tqdm=False))
        for prompt in PROMPTS for params in (GREEDY, SAMPLED)
    }  # fmt: skip
    calls = [*alone] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda call: tokens(demo.generate(*call, use_tqdm=False)), calls))
    assert found == [alone[call] for call in calls]
    assert is_idle(demo)


def test_streams_of_many_threads_end_as_generated(demo):
    alone = {prompt: tokens(demo.generate(prompt, GREEDY, use_tqdm=False)) for prompt in PROMPTS}

    def streamed(prompt):
        outputs = list(demo.stream(prompt, GREEDY))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        return tokens(outputs[-1:])

    calls = PROMPTS * 4
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(streamed, calls)) == [alone[prompt] for prompt in calls]
    assert is_idle(demo)


def test_a_call_amid_a_stream_gets_its_own_and_the_stream_goes_on_with_its_end(demo):
    alone = tokens(demo.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    stream = demo.stream(PROMPTS[0], GREEDY)
    assert not next(stream).finished
    assert tokens(demo.generate(PROMPTS[1], GREEDY, use_tqdm=False)) == alone[1:]
    (last,) = stream
    assert last.finished
    assert tokens([last]) == alone[:1]
    assert is_idle(demo)


def test_two_streams_in_turn_each_end_as_generated(demo):
    alone = tokens(demo.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    first, second = demo.stream(PROMPTS[0], GREEDY), demo.stream(PROMPTS[1], GREEDY)
    next(first)
    next(second)
    assert tokens([*first][-1:]) + tokens([*second][-1:]) == alone


@pytest.mark.parametrize("ending", ["close", "drop", "keep"])
def test_an_abandoned_stream_keeps_no_thread_waiting(demo, ending):
    alone = tokens(demo.generate(PROMPTS[1], GREEDY, use_tqdm=False))
    stream = demo.stream(PROMPTS[0], GREEDY)
    next(stream)
    if ending == "close":
        stream.close()
    if ending == "drop":
        del stream
    if ending != "keep":
        assert is_idle(demo)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(demo.generate, PROMPTS[1], GREEDY, use_tqdm=False).result(timeout=60)
    assert tokens(found) == alone
    assert is_idle(demo)


def test_a_call_within_a_call_is_one_clear_error_and_the_outer_one_goes_on(demo, monkeypatch):
    alone = tokens(demo.generate(PROMPTS[0], GREEDY, use_tqdm=False))
    step, errors = Engine.step, []

    def step_with_a_call(engine):
        if not errors:
            with pytest.raises(RuntimeError, match="within a call of this LLM already") as caught:
                demo.generate(PROMPTS[1], GREEDY, use_tqdm=False)
            errors.append(caught.value)
            assert not demo.reset_prefix_cache()
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_with_a_call)
    assert tokens(demo.generate(PROMPTS[0], GREEDY, use_tqdm=False)) == alone
    assert errors


def test_a_stream_cut_short_by_an_error_in_another_call_ends_in_an_abort(demo, monkeypatch):
    stream = demo.stream(PROMPTS[0], GREEDY)
    next(stream)
    step, raised = Engine.step, []

    def interrupted(engine):
        if not raised:
            raised.append(True)
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in stream] == ["abort"]
    assert is_idle(demo)


def test_an_interrupt_ends_the_wait_for_another_thread(demo, monkeypatch):
    may_step, is_stepping, step = threading.Event(), threading.Event(), Engine.step

    def step_when_told(engine):
        is_stepping.set()
        assert may_step.wait(60)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_when_told)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(demo.generate, PROMPTS[0], GREEDY, use_tqdm=False)
        assert is_stepping.wait(60)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                demo.generate(PROMPTS[1], GREEDY, use_tqdm=False)
            assert time.monotonic() - started < 30
        finally:
            may_step.set()
        assert other.result(timeout=60)[0].finished
    assert is_idle(demo)
