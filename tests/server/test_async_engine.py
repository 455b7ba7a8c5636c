"""The engine's thread: every request it accepts ends in exactly one terminal event, whatever happens."""

import asyncio
import ctypes
import threading
import time

import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.engine.engine import Engine, EngineDeadError
from jaxpaged.server.async_engine import AsyncEngine, EngineState
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4)
PROMPT = {"prompt": None, "prompt_token_ids": (0, 41, 74, 504)}


def with_engine(llm, test, **options):
    """Run a coroutine over a ready engine, and see that its accounts are closed."""

    async def main():
        outputs = []
        engine = AsyncEngine(lambda: llm, ServerConfig(**options), outputs.append)
        engine.start()
        await engine.wait_until(lambda: engine.state is EngineState.READY)
        num_before = engine.stats.num_requests_accepted
        try:
            await test(engine)
        finally:
            await engine.close(10)
        assert engine.num_unfinished == 0
        ends = [output.request_id for output in outputs if output.finished]
        if engine.state is not EngineState.DEAD:
            assert len(ends) == engine.stats.num_requests_accepted - num_before
            assert engine.stats.num_requests_accepted == engine.stats.num_requests_finished
            assert engine.stats.num_used_blocks == 0
            llm.engine.scheduler.check()

    asyncio.run(main())


def submit(engine, params=SHORT, count=1, **options):
    return engine.submit([PROMPT] * count, params, num_tokens=[4 + params.max_tokens] * count, **options)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_requests_end_as_generated_offline(llm):
    expected = tokens_of(llm.generate([PROMPT["prompt_token_ids"]], SHORT, use_tqdm=False))

    async def test(engine):
        replies = [submit(engine, count=3) for _ in range(4)]
        for reply in replies:
            outputs = await reply.finished()
            assert tokens_of(outputs) == expected * 3
            assert not reply.unfinished_ids

    with_engine(llm, test)


def test_a_slow_reader_gets_the_newest_and_misses_nothing(llm):
    async def test(engine):
        reply = submit(engine, LONG, is_streamed=True)
        first = (await reply.next())[0]
        assert not first.finished
        await engine.wait_until(lambda: engine.num_unfinished == 0)  # reading nothing meanwhile
        last = (await reply.next())[0]
        assert last.finished
        assert len(last.outputs[0].token_ids) == 100
        assert last.outputs[0].text.startswith(first.outputs[0].text)

    with_engine(llm, test)


def test_an_abort_takes_effect_before_the_next_step(llm, monkeypatch):
    step, may_step, in_step = Engine.step, threading.Semaphore(0), threading.Semaphore(0)

    def step_when_told(engine):
        in_step.release()
        assert may_step.acquire(timeout=60)
        return step(engine)

    async def test(engine):
        monkeypatch.setattr(Engine, "step", step_when_told)
        reply = submit(engine, LONG, is_streamed=True)
        await asyncio.to_thread(in_step.acquire)
        engine.abort(reply)  # while a step runs
        may_step.release()
        await asyncio.to_thread(in_step.acquire)  # the next step is about to begin
        (group,) = [live.group for live in llm.engine._live.values()]
        assert group.is_finished
        monkeypatch.setattr(Engine, "step", step)
        may_step.release(100)
        output = (await reply.finished())[0]
        assert output.outputs[0].finish_reason == "abort"
        engine.abort(reply)  # of one that has ended: nothing
        assert tokens_of(await submit(engine).finished())

    with_engine(llm, test)


def test_a_request_aborted_before_the_thread_saw_it_ends_too(llm):
    async def test(engine):
        reply = submit(engine, LONG, count=4)
        engine.abort(reply)
        for output in await reply.finished():
            assert output.outputs[0].finish_reason == "abort"

    with_engine(llm, test)


def test_what_finds_no_room_is_refused_at_once_and_the_others_go_on(llm):
    async def test(engine):
        reply = submit(engine, LONG, count=3)
        started = time.thread_time()  # of this thread alone: it waits for nobody
        with pytest.raises(ApiError, match="3 of 4 prompts are in it") as caught:
            submit(engine, count=2)
        assert time.thread_time() - started < 0.02
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers["retry-after"]) >= 1
        with pytest.raises(ApiError, match="at most 4 at once") as caught:
            submit(engine, count=5)
        assert caught.value.status == 400
        assert len(await reply.finished()) == 3
        assert engine.rejected == {"queue_full": 2, "request_too_large": 5}

    with_engine(llm, test, max_queued_requests=4)


def test_room_is_counted_in_tokens_too(llm):
    async def test(engine):
        reply = submit(engine, LONG)
        with pytest.raises(ApiError, match="104 of 150 tokens") as caught:
            submit(engine, LONG)
        assert caught.value.status == 429
        with pytest.raises(ApiError, match="at most 150 at once") as caught:
            submit(engine, LONG, count=2)
        assert caught.value.status == 400
        await reply.finished()
        await submit(engine, LONG).finished()

    with_engine(llm, test, max_queued_tokens=150)


def test_what_the_engine_refuses_comes_as_the_replys_error_and_counts_as_rejected(llm):
    async def test(engine):
        reply = engine.submit([{"prompt_token_ids": (5000,)}], SHORT, num_tokens=[5])
        with pytest.raises(ApiError, match="5000 is not from 0 to 1023") as caught:
            await reply.finished()
        assert caught.value.status == 400
        assert not reply.unfinished_ids
        assert engine.rejected == {"invalid_value": 1}

    with_engine(llm, test)


def test_a_name_in_use_is_refused_and_free_again_when_its_request_has_ended(llm):
    async def test(engine):
        reply = submit(engine, LONG, request_id="mine")
        with pytest.raises(ApiError, match="'mine' is in use") as caught:
            submit(engine, request_id="mine")
        assert caught.value.status == 409
        await reply.finished()
        await submit(engine, request_id="mine").finished()

    with_engine(llm, test)


@pytest.mark.parametrize(("option", "code"), [("request_timeout_s", "request_timeout"), ("queue_timeout_s", None)])
def test_a_request_whose_time_is_over_ends_with_that_error(llm, monkeypatch, option, code):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)

    async def test(engine):
        reply = submit(engine, LONG)
        if code is None:  # it has started: that limit is not for it
            assert len((await reply.finished())[0].outputs[0].token_ids) == 100
            assert not engine.failed
            return
        with pytest.raises(ApiError, match="0.3 s") as caught:
            await reply.finished()
        assert caught.value.code == code
        assert engine.failed == {code: 1}

    with_engine(llm, test, **{option: 0.3})


def test_a_request_that_waits_too_long_for_its_turn_ends_with_that_error(llm, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)

    async def test(engine):
        running = submit(engine, LONG, count=4)  # every row
        await asyncio.sleep(0.1)
        waiting = submit(engine)
        with pytest.raises(ApiError, match="queue_timeout_s") as caught:
            await waiting.finished()
        assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        assert len(await running.finished()) == 4

    with_engine(llm, test, queue_timeout_s=0.5)


def test_draining_lets_what_runs_end_and_accepts_nothing(llm):
    async def test(engine):
        reply = submit(engine, LONG)
        engine.drain()
        with pytest.raises(ApiError) as caught:
            submit(engine)
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
        assert "retry-after" in caught.value.headers
        await engine.close(30)
        assert len((await reply.finished())[0].outputs[0].token_ids) == 100
        assert engine.state is EngineState.DRAINING
        assert not engine.has_running_thread

    with_engine(llm, test)


def test_what_has_not_ended_when_the_drain_is_over_ends_with_one_error(llm, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)

    async def test(engine):
        replies = [submit(engine, LONG) for _ in range(6)]  # some run, some wait
        await asyncio.sleep(0.1)
        await engine.close(0.2)
        for reply in replies:
            with pytest.raises(ApiError, match=r"given 0.2 s") as caught:
                await reply.finished()
            assert caught.value.code == "shutting_down"

    with_engine(llm, test)


@pytest.mark.parametrize("way", ["dead engine", "unforeseen error", "killed thread"])
def test_a_dead_engine_ends_every_request_with_one_error_and_accepts_none(way, monkeypatch):
    llm = LLM("demo", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_device_blocks=13,
              host_memory_bytes=2**22, preemption="swap", show_progress=False)
    step = Engine.step
    steps = iter(range(10**6))

    def step_that_fails(engine):
        if next(steps) == 5:
            if way == "dead engine":
                raise EngineDeadError("the cache is lost")
            if way == "unforeseen error":
                raise RuntimeError("the cache is lost")
            thread = threading.current_thread()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        return step(engine)

    async def test(engine):
        monkeypatch.setattr(Engine, "step", step_that_fails)
        replies = [submit(engine, LONG) for _ in range(6)]
        for reply in replies:
            with pytest.raises(ApiError, match="the engine is dead") as caught:
                await asyncio.wait_for(reply.finished(), 30)
            assert (caught.value.status, caught.value.code) == (500, "engine_dead")
        assert engine.state is EngineState.DEAD
        assert engine.failed == {"engine_dead": 6}
        with pytest.raises(ApiError, match="the engine is dead") as caught:
            submit(engine)
        assert caught.value.status == 503
        assert engine.stats.num_requests_accepted == engine.stats.num_requests_finished == 6

    with_engine(llm, test)


def test_a_model_that_cannot_be_loaded_is_a_dead_engine_with_the_cause():
    may_load = threading.Event()

    def load():
        assert may_load.wait(60)
        return LLM("no/such/folder")

    async def main():
        engine = AsyncEngine(load, ServerConfig())
        engine.start()
        assert engine.state is EngineState.LOADING
        with pytest.raises(ApiError, match="not ready yet") as caught:
            engine.submit([PROMPT], SHORT, num_tokens=[8])
        assert caught.value.status == 503
        may_load.set()
        await engine.wait_until(lambda: engine.state is EngineState.DEAD)
        assert "is not a folder" in str(engine.failure)
        await engine.close(1)

    asyncio.run(main())


def test_an_error_of_one_requests_text_is_its_own(llm, monkeypatch):
    make = Engine._make_detokenizer

    def failing_for_one(engine, live):
        if live.request.params.max_tokens == 7:
            raise RuntimeError("a bad token")
        return make(engine, live)

    monkeypatch.setattr(Engine, "_make_detokenizer", failing_for_one)

    async def test(engine):
        good, bad = submit(engine), submit(engine, SamplingParams(temperature=0, max_tokens=7))
        assert (await bad.finished())[0].outputs[0].finish_reason == "error"
        assert (await good.finished())[0].outputs[0].finish_reason == "length"

    with_engine(llm, test)
