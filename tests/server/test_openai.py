"""OpenAI's own client, and its published contract, are content with the answers."""

import asyncio
from typing import Any

import openai
import pytest
from server_harness import events_of

from jaxpaged.engine.engine import Engine

MESSAGES: Any = [{"role": "user", "content": "Who goes there?"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "jaxpaged"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found"


def test_the_client_completes_and_chats(client):
    completion = client.completions.create(model="demo", prompt="ROMEO:\n", max_tokens=5, temperature=0, logprobs=1)
    assert completion.choices[0].finish_reason == "length"
    assert len(completion.choices[0].logprobs.tokens) == 5
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2, n=2, extra_body={"top_k": 3}
    )
    assert len(chat.choices) == 2
    assert len(chat.choices[1].logprobs.content) == 5
    assert chat.usage.completion_tokens == 10


def test_the_client_reads_streams(client):
    body: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**body).choices[0].message.content
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 12
    pieces = client.completions.create(model="demo", prompt="ROMEO:\n", max_tokens=5, temperature=0, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in pieces][-1] == "length"


def test_many_clients_at_once_each_get_what_each_would_have_got_alone(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed(prompt):
                text = ""
                async for chunk in await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=10, temperature=0, stream=True
                ):
                    text += chunk.choices[0].text
                return text

            async def whole(prompt):
                answer = await client.completions.create(model="demo", prompt=prompt, max_tokens=10, temperature=0)
                return answer.choices[0].text

            prompts = [f"{name}:\n" for name in ("ROMEO", "JULIET", "KING", "First Citizen")] * 4
            alone = {prompt: await whole(prompt) for prompt in set(prompts)}
            assert await asyncio.gather(*map(streamed, prompts)) == [alone[prompt] for prompt in prompts]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": -1}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x " * 500}]}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_the_client_reads_errors(client, body, error, code):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, **body})
    assert caught.value.code == code
    assert caught.value.body["message"]


def test_an_error_amid_a_stream_is_raised_by_the_client(server, client, monkeypatch):
    append = Engine._append

    def failing_later(engine, live, event, now):
        if event.sequence.num_output_tokens == 5:
            raise RuntimeError("a bad token")
        append(engine, live, event, now)

    monkeypatch.setattr(Engine, "_append", failing_later)
    stream = client.completions.create(model="demo", prompt="ROMEO:\n", max_tokens=50, stream=True)
    assert next(stream).choices[0].finish_reason is None
    with pytest.raises(openai.APIError, match="a bad token"):
        list(stream)


# ---- the published contract


def test_answers_keep_openais_contract(server, contract):
    contract("ListModelsResponse", server.http.get("/v1/models").json())
    # without echo: a prompt's first token has null for its log-probability, which the contract forgets
    body = {"logprobs": 2, "n": 2, "temperature": 1}
    contract("CreateCompletionResponse", server.complete(["ROMEO:", "KING:"], **body).json())
    contract("CreateCompletionResponse", server.complete(echo=True).json())
    contract("CreateCompletionResponse", server.complete(stop=["a"], max_tokens=50).json())
    logprobs = {"logprobs": True, "top_logprobs": 2}
    contract("CreateChatCompletionResponse", server.chat(n=2, temperature=1, **logprobs).json())
    contract("CreateChatCompletionResponse", server.chat().json())
    options = {"include_usage": True}
    for chunk in events_of(server.chat(stream=True, stream_options=options, **logprobs)):
        contract("CreateChatCompletionStreamResponse", chunk)
    for answer in (server.complete(n=0), server.complete(model="x"), server.http.get("/nowhere")):
        contract("ErrorResponse", answer.json())
