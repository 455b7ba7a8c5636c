"""POST /v1/chat/completions: a conversation in; the assistant's message out, whole or in pieces."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from jaxpaged.engine.outputs import CompletionOutput, RequestOutput
from jaxpaged.server.completions import Progress
from jaxpaged.server.errors import ApiError
from jaxpaged.server.protocol import ChatBody
from jaxpaged.server.reply import Reply
from jaxpaged.server.service import Service, checked, num_choices, usage_of
from jaxpaged.server.token_texts import chat_logprobs, prompt_logprobs
from jaxpaged.server.tool_parser import CallArguments, CallBegun, CallBroken, CallEnded, Content, Event, ToolParser
from jaxpaged.server.tools import ToolPlan, plan_tools


class TextReader:
    """Reads what a model writes where there are no calls in it."""

    num_calls = 0

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(kw_only=True)
class ChatProgress(Progress):
    """What of one choice has been sent, and who reads its text."""

    parser: ToolParser | TextReader


class ChatJob:
    """One conversation in the engine, and its answer in OpenAI's form."""

    def __init__(self, service: Service, body: ChatBody, plan: ToolPlan, reply: Reply) -> None:
        self.service = service
        self.body = body
        self.reply = reply
        self._make_parser = plan.make_parser or TextReader
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
        plan = plan_tools(body, service.tool_dialect, service.tokenizer.special_tokens)
        if plan.has_special_marker:
            further["skip_special_tokens"] = False
        params = service.params_of(body, plan.form, **further)
        prompt = await service.chat_prompt(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs or {},
            tools=plan.template_tools,
        )
        return cls(service, body, plan, service.submit([prompt], params, body, plan.form_param))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.service.model_name}

    async def whole(self) -> dict[str, Any]:
        """The answer when everything is done."""
        (output,) = await self.reply.finished()
        output = checked(output, self.body)
        choices = []
        for one in output.outputs:
            parser = self._make_parser()
            message = message_of([*parser.feed(one.text), *parser.finish()])
            choices.append({
                "index": one.index,
                "message": message,
                "logprobs": self._logprobs(one, 0),
                "finish_reason": _reason(one, parser),
                "stop_reason": one.stop_reason,
            })
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
        progress = [ChatProgress(parser=self._make_parser()) for _ in range(num_choices(self.body))]
        output: RequestOutput | None = None

        def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
            made = {**head, "choices": choices}
            if is_usage_asked:
                is_continuous = options is not None and options.continuous_usage_stats
                made["usage"] = usage_of([output]) if is_continuous and output is not None else None
            return made

        while not all(one.is_done for one in progress):
            output = checked((await self.reply.next())[0], self.body)
            for one in output.outputs:
                for choice in self._pieces(progress[one.index], one):
                    yield chunk([choice])
        if is_usage_asked:
            assert output is not None
            yield {**head, "choices": [], "usage": usage_of([output])}

    def _pieces(self, progress: ChatProgress, one: CompletionOutput) -> list[dict[str, Any]]:
        """What is new of one choice: its role, new text, its calls, its end."""
        if progress.is_done:
            return []
        pieces = []
        if not progress.has_begun:
            progress.has_begun = True
            pieces.append(_choice(one, {"role": "assistant", "content": ""}))
        is_end = one.finish_reason is not None
        events = progress.parser.feed(one.text[progress.num_chars :])
        deltas = deltas_of([*events, *(progress.parser.finish() if is_end else ())])
        logprobs = None
        if self.body.logprobs and len(one.token_ids) > progress.num_tokens:
            logprobs = self._logprobs(one, progress.num_tokens)
            deltas = deltas or [{"content": ""}]
        for delta in deltas:
            pieces.append(_choice(one, delta, logprobs=logprobs))
            logprobs = None
        progress.num_chars, progress.num_tokens = len(one.text), len(one.token_ids)
        if is_end:
            progress.is_done = True
            pieces.append({**_choice(one, {}, _reason(one, progress.parser)), "stop_reason": one.stop_reason})
        return pieces

    def _logprobs(self, one: CompletionOutput, start: int) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        return chat_logprobs(one.logprobs[start:], self.service.texts, self._num_top)


def _reason(one: CompletionOutput, parser: ToolParser | TextReader) -> str | None:
    """The end as OpenAI tells it: a message with calls ends in "tool_calls" unless it was cut short."""
    return "tool_calls" if parser.num_calls and one.finish_reason == "stop" else one.finish_reason


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """The assistant's whole message."""
    texts: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case Content(text=text):
                texts.append(text)
            case CallBegun(index=index, id=call_id, name=name):
                calls[index] = _call(call_id, name)
            case CallArguments(index=index, text=text):
                calls[index]["function"]["arguments"] += text
            case CallBroken(index=index):
                del calls[index]
            case CallEnded():
                pass
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts), "refusal": None}
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": list(calls.values())}
    return message


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def deltas_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The same in pieces: content; of a call its name first, then its arguments."""
    deltas: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Content(text=text):
                deltas.append({"content": text})
            case CallBegun(index=index, id=call_id, name=name):
                deltas.append({"tool_calls": [{"index": index, **_call(call_id, name)}]})
            case CallArguments(index=index, text=text):
                deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case CallBroken() | CallEnded():
                pass
    return deltas


def _choice(
    one: CompletionOutput, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": one.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
