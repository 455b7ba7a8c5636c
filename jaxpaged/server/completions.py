"""POST /v1/completions: text, token ids or a list of them in; whole answers or pieces out."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from jaxpaged.engine.outputs import CompletionOutput, RequestOutput
from jaxpaged.server.errors import ApiError
from jaxpaged.server.params import form_of, form_param
from jaxpaged.server.protocol import CompletionBody
from jaxpaged.server.reply import Reply
from jaxpaged.server.service import Service, TokenPrompt, checked, num_choices, usage_of
from jaxpaged.server.token_texts import completion_logprobs, prompt_logprobs


@dataclass
class Progress:
    """What of one choice has been sent."""

    num_chars: int = 0
    num_tokens: int = 0
    text_offset: int = 0
    has_begun: bool = False
    is_done: bool = False


class CompletionJob:
    """One request in the engine, and its answer in OpenAI's form."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[TokenPrompt], reply: Reply) -> None:
        self.service = service
        self.body = body
        self.prompts = prompts
        self.reply = reply
        self.num_samples = num_choices(body)
        self.has_output = body.max_tokens != 0
        self._head = {
            "id": f"cmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    @classmethod
    async def start(cls, service: Service, body: CompletionBody) -> "CompletionJob":
        """Check, tokenize and submit; ApiError for what is refused."""
        service.check_model(body.model)
        further: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            further["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        if body.max_tokens == 0:
            if not body.echo:
                raise ApiError(400, "max_tokens=0 asks for nothing: it goes with echo", param="max_tokens")
            # the engine makes a token at least; it is dropped
            further |= {"max_tokens": 1, "min_tokens": 0}
        params = service.params_of(body, form_of(body), **further)
        prompts = await service.prompts_of(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        return cls(service, body, prompts, service.submit(prompts, params, body, form_param(body)))

    async def whole(self) -> dict[str, Any]:
        """The answer when everything is done."""
        outputs = [checked(output, self.body) for output in await self.reply.finished()]
        choices = []
        for index, output in enumerate(outputs):
            for one in output.outputs:
                choice = self._piece(Progress(), index, output, one)
                assert choice is not None
                if self.body.prompt_logprobs is not None:
                    assert output.prompt_logprobs is not None
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self.service.texts)
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": usage_of(outputs, has_output=self.has_output)}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in pieces: one finish_reason for each choice, and the usage last where it is asked for."""
        options = self.body.stream_options
        is_usage_asked = options is not None and options.include_usage
        progress = [Progress() for _ in range(len(self.prompts) * self.num_samples)]
        latest: dict[int, RequestOutput] = {}
        while not all(one.is_done for one in progress):
            news = await self.reply.next()
            latest.update(news)
            for index, output in news.items():
                checked(output, self.body)
                for one in output.outputs:
                    choice = self._piece(progress[index * self.num_samples + one.index], index, output, one)
                    if choice is None:
                        continue
                    chunk = {**self._head, "choices": [choice]}
                    if is_usage_asked:
                        is_continuous = options is not None and options.continuous_usage_stats
                        chunk["usage"] = usage_of([output], has_output=self.has_output) if is_continuous else None
                    yield chunk
        if is_usage_asked:
            outputs = list(latest.values())
            yield {**self._head, "choices": [], "usage": usage_of(outputs, has_output=self.has_output)}

    def _piece(
        self, progress: Progress, index: int, output: RequestOutput, one: CompletionOutput
    ) -> dict[str, Any] | None:
        """What is new of one choice; None if nothing is."""
        if progress.is_done:
            return None
        text, logprobs = "", None
        if not progress.has_begun and self.body.echo:
            text, logprobs = self._echo(progress, index, output)
        if self.has_output:
            text += one.text[progress.num_chars :]
            new_ids = one.token_ids[progress.num_tokens :]
            if self.body.logprobs is not None and one.logprobs is not None and new_ids:
                entries = one.logprobs[progress.num_tokens :]
                logprobs = _joined(logprobs, self._logprobs(progress, entries, new_ids))
            progress.num_chars, progress.num_tokens = len(one.text), len(one.token_ids)
        is_end = one.finish_reason is not None
        if not text and logprobs is None and not is_end:
            return None
        progress.has_begun, progress.is_done = True, is_end
        finish_reason = one.finish_reason if self.has_output or not is_end else "length"
        return {
            "index": index * self.num_samples + one.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": one.stop_reason if self.has_output else None,
        }

    def _echo(self, progress: Progress, index: int, output: RequestOutput) -> tuple[str, dict[str, Any] | None]:
        """The prompt as the beginning of the answer."""
        prompt = self.prompts[index]
        text = prompt.text
        if text is None:
            text = self.service.tokenizer.decode(list(prompt.token_ids))
        if self.body.logprobs is None:
            return text, None
        assert output.prompt_logprobs is not None
        return text, self._logprobs(progress, output.prompt_logprobs, prompt.token_ids)

    def _logprobs(self, progress: Progress, entries: Any, token_ids: Any) -> dict[str, Any]:
        assert self.body.logprobs is not None
        found = completion_logprobs(
            entries, token_ids, self.service.texts, self.body.logprobs, progress.text_offset
        )
        if found["tokens"]:
            progress.text_offset = found["text_offset"][-1] + self.service.texts.length_shown(token_ids[-1])
        return found


def _joined(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    return after if before is None else {name: before[name] + after[name] for name in after}
