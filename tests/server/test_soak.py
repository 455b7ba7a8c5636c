"""Many clients for long, some of which leave: memory flat, blocks back, counters conserved, nothing compiled."""

import asyncio
import csv
import gc
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from server_harness import running_server

TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "azure_conv_2023.csv"
SCALE = 16
"""The trace's lengths are divided by it: the model of the tests has 128 tokens."""
NUM_CLIENTS = 12


def lengths():
    """Prompt and output tokens of each request of the trace, made small."""
    if not TRACE.is_file():
        pytest.skip("the trace is not beside this checkout")
    with TRACE.open() as file:
        for row in csv.DictReader(file):
            prompt = min(max(int(row["ContextTokens"]) // SCALE, 1), 90)
            yield prompt, min(max(int(row["GeneratedTokens"]) // SCALE, 1), 127 - prompt)


async def one_request(port, rng, shape, outcomes):
    """A request of the trace's lengths; its client may leave at any time."""
    num_prompt, num_output = shape
    kind = rng.choice(["whole", "whole", "stream", "stream", "leaves", "leaves stream", "wrong"])
    body = {
        "prompt": [rng.randrange(2, 1024) for _ in range(num_prompt)],
        "max_tokens": num_output,
        "temperature": rng.choice([0, 1]),
        "seed": 1,
        "ignore_eos": True,
        "stream": "stream" in kind,
    }
    if kind == "wrong":
        body["temperature"] = -1
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        if kind.startswith("leaves"):
            await asyncio.sleep(rng.random() * 0.3)
            writer.transport.abort()
            outcomes["left"] += 1
            return
        received = await asyncio.wait_for(reader.read(), 120)
        status = received.split(b" ", 2)[1]
        if kind == "wrong":
            assert status == b"400", received
        elif kind == "stream":
            assert status == b"200", received
            assert received.count(b'"finish_reason":"length"') == 1
            assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            assert b'"completion_tokens":%d' % num_output in received, received
        outcomes[kind] += 1
    finally:
        writer.close()


def soak(server, count, seed):
    rng = random.Random(seed)
    shapes = list(lengths())
    outcomes = Counter()

    async def main():
        waiting = iter([rng.choice(shapes) for _ in range(count)])

        async def client(number):
            mine = random.Random(seed + number)
            for shape in waiting:
                await one_request(server.port, mine, shape, outcomes)

        await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))

    asyncio.run(main())
    server.settle()
    assert sum(outcomes.values()) == count
    return outcomes


def run_soak(llm, count, growth_bytes):
    num_preempted = llm.stats().num_preemptions
    num_compiles = llm.stats().num_compiles_after_warmup
    with running_server(llm) as server:
        soak(server, 60, 1)  # what is made once is made
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        outcomes = soak(server, count, 2)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        stats = llm.stats()
        assert stats.num_requests_accepted == stats.num_requests_finished
        assert stats.num_used_blocks == 0
        assert stats.num_compiles_after_warmup == num_compiles
        assert stats.num_preemptions > num_preempted  # it met pressure
        assert server.engine.rejected.keys() <= {"invalid_value"}
        assert not server.engine.failed
        assert grown < growth_bytes, f"{grown} bytes"
    return outcomes


def test_nothing_grows_or_is_lost_in_some_hundred_requests(llm):
    outcomes = run_soak(llm, 300, 300_000)
    assert min(outcomes.values()) > 20
    assert set(outcomes) == {"whole", "stream", "left", "wrong"}


@pytest.mark.slow
def test_nothing_grows_or_is_lost_in_two_thousand_requests(llm):
    run_soak(llm, 2000, 300_000)
