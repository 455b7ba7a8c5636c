"""POST /v1/chat/completions: a conversation in; the assistant's message out, whole or in pieces."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from jaxpaged.engine.outputs import CompletionOutput, RequestOutput
from jaxpaged.server.completions import Progress
from jaxpaged.server.errors import ApiError
from jaxpaged.server.protocol import ChatBody
from jaxpaged.server.reply import Reply
from jaxpaged.server.service import Service, check_outcome, usage_of
from jaxpaged.server.token_texts import chat_logprobs, prompt_logprobs


class ChatJob:
    """One conversation in the engine, and its answer in OpenAI's form."""

    def __init__(self, service: Service, body: ChatBody, reply: Reply) -> None:
        self.service = service
        self.body = body
        self.reply = reply
        self._num_top = body.top_logprobs or 0
        self._id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
        self._created = int(time.time())

    @classmethod
    async def start(cls, service: Service, body: ChatBody) -> "ChatJob":
        """Check, render, tokenize and submit; ApiError for what is refused."""
        service.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs=true: set it, or leave both out", param="top_logprobs")
        if body.add_special_tokens:
            raise ApiError(
                400, "add_special_tokens=true would put a second beginning before the chat template's: leave it out",
                param="add_special_tokens",
            )
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if max_tokens is None:
            max_tokens = service.engine.llm.generation_defaults.max_tokens
        further: dict[str, Any] = {
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
            "max_tokens": max_tokens,  # None: to the end of the context, as OpenAI's
        }
        params = body.sampling_params(service.default_params, **further)
        prompt = await service.chat_prompt(
            body.messages, add_generation_prompt=body.add_generation_prompt, variables=body.chat_template_kwargs or {}
        )
        return cls(service, body, service.submit([prompt], params, body))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.service.model_name}

    async def whole(self) -> dict[str, Any]:
        """The answer when everything is done."""
        (output,) = await self.reply.finished()
        check_outcome(output)
        choices = [
            {
                "index": one.index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one, 0),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in output.outputs
        ]
        answer = {**self._head("chat.completion"), "choices": choices, "usage": usage_of([output])}
        if self.body.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self.service.texts)
        return answer

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces: for each choice its role first and its finish_reason last, then the usage if asked."""
        options = self.body.stream_options
        is_usage_asked = options is not None and options.include_usage
        head = self._head("chat.completion.chunk")
        progress = [Progress() for _ in range(self.body.n or 1)]
        output: RequestOutput | None = None

        def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
            made = {**head, "choices": choices}
            if is_usage_asked:
                is_continuous = options is not None and options.continuous_usage_stats
                made["usage"] = usage_of([output]) if is_continuous and output is not None else None
            return made

        while not all(one.is_done for one in progress):
            output = (await self.reply.next())[0]
            check_outcome(output)
            for one in output.outputs:
                for choice in self._pieces(progress[one.index], one):
                    yield chunk([choice])
        if is_usage_asked:
            assert output is not None
            yield {**head, "choices": [], "usage": usage_of([output])}

    def _pieces(self, progress: Progress, one: CompletionOutput) -> list[dict[str, Any]]:
        """What is new of one choice: its role, new text, its end."""
        if progress.is_done:
            return []
        pieces = []
        if not progress.has_begun:
            progress.has_begun = True
            pieces.append(_choice(one, {"role": "assistant", "content": ""}))
        text = one.text[progress.num_chars :]
        has_logprobs = self.body.logprobs and len(one.token_ids) > progress.num_tokens
        if text or has_logprobs:
            logprobs = self._logprobs(one, progress.num_tokens) if has_logprobs else None
            pieces.append(_choice(one, {"content": text}, logprobs=logprobs))
        progress.num_chars, progress.num_tokens = len(one.text), len(one.token_ids)
        if one.finish_reason is not None:
            progress.is_done = True
            pieces.append({**_choice(one, {}, one.finish_reason), "stop_reason": one.stop_reason})
        return pieces

    def _logprobs(self, one: CompletionOutput, start: int) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        return chat_logprobs(one.logprobs[start:], self.service.texts, self._num_top)


def _choice(
    one: CompletionOutput, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": one.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
