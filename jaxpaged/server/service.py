"""What every endpoint works with: the engine, the limits, the model's name, and how prompts become tokens."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.engine.prompts import as_prompt_list, read_prompt
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.config import ServerConfig
from jaxpaged.server.errors import ApiError, invalid, refusal
from jaxpaged.server.params import params_of
from jaxpaged.server.protocol import Sampling
from jaxpaged.server.reply import Reply
from jaxpaged.server.token_texts import TokenTexts
from jaxpaged.server.tool_parser import detect_dialect
from jaxpaged.server.tools import with_read_arguments
from jaxpaged.structured_outputs import StructuredOutputsParams

Result = TypeVar("Result")
Params = SamplingParams | BeamSearchParams
SHORT_CHARS = 2000
"""A text of up to so many characters is tokenized at once: that takes less time than to change threads."""
TAKEN_NAMES = ("self", "messages", "tools", "documents", "add_generation_prompt")
"""Names of a chat template that have a parameter of their own, or none."""
RENDER_TIMEOUT_S = 20.0
"""Time for a chat template and the tokens of what it gives."""


@dataclass(frozen=True, kw_only=True)
class TokenPrompt:
    """One prompt, tokenized; `text` is None where it came as token ids."""

    text: str | None
    token_ids: tuple[int, ...]


class Service:
    """One served model."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, model_name: str) -> None:
        self.engine = engine
        self.config = config
        self.model_name = model_name
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="jaxpaged-tokenize")

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.llm.engine.tokenizer
        assert tokenizer is not None  # an LLM always has one
        return tokenizer

    @property
    def max_model_len(self) -> int:
        return self.engine.llm.engine.max_model_len

    @cached_property
    def default_params(self) -> SamplingParams:
        return self.engine.llm.get_default_sampling_params()

    @cached_property
    def tool_dialect(self) -> str | None:
        """How the model writes calls of functions; None where nobody knows."""
        if self.config.tool_call_parser != "auto":
            return self.config.tool_call_parser
        return detect_dialect(self.tokenizer.chat_template_source or "")

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """ApiError 404 unless the name is the served model's; None is it."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist: this server has {self.model_name!r}", param="model",
                code="model_not_found",
            )

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run what takes long beside the event loop, for RENDER_TIMEOUT_S at most; a ValueError becomes a 400."""
        try:
            async with asyncio.timeout(RENDER_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError as error:
            raise ApiError(
                400, f"to render and tokenize this prompt took more than {RENDER_TIMEOUT_S:g} s: shorten it",
                code="prompt_timeout",
            ) from error
        except ValueError as error:
            raise refusal(error) from error

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, in which special tokens are plain text."""
        encode = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        if len(text) > SHORT_CHARS:
            return tuple(await self.in_thread(encode))
        try:
            return tuple(encode())
        except ValueError as error:
            raise refusal(error, "prompt") from error

    async def prompts_of(self, prompt: Any, *, add_special_tokens: bool = True) -> list[TokenPrompt]:
        """The prompts of a completion request: text, ids, or a list of either."""
        try:
            contents = [read_prompt(one) for one in self._listed(prompt)]
        except ValueError as error:
            raise refusal(error, "prompt") from error
        prompts = []
        for content in contents:
            ids = content.token_ids
            if ids is None:
                ids = await self.tokenize(content.text or "", add_special_tokens=add_special_tokens)
            prompts.append(TokenPrompt(text=content.text, token_ids=ids))
        return prompts

    def _listed(self, prompt: Any) -> Sequence[Any]:
        if not isinstance(prompt, (str, list)):
            raise ValueError("prompt must be text, token ids, or a list of either")
        listed = as_prompt_list(prompt)
        for one in listed:
            if isinstance(one, Mapping):
                raise ValueError("prompt must be text, token ids, or a list of either, not an object")
        if len(listed) > self.config.max_prompts:
            raise ValueError(
                f"{len(listed)} prompts in one request; at most {self.config.max_prompts} are allowed (max_prompts): "
                "make several requests"
            )
        return listed

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> TokenPrompt:
        """A conversation through the checkpoint's template, as tokens."""
        for name in variables:
            if name in TAKEN_NAMES or not name.isidentifier():
                raise invalid("chat_template_kwargs", f"chat_template_kwargs cannot set {name[:80]!r}: leave it out")
        encode = partial(
            self.tokenizer.encode_chat,
            with_read_arguments(messages),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **variables,
        )
        ids = await self.in_thread(encode)
        if not ids:
            raise ApiError(400, "the model's chat template makes nothing of these messages", param="messages")
        return TokenPrompt(text=None, token_ids=tuple(ids))

    def params_of(self, body: Sampling, form: StructuredOutputsParams | None, **further: Any) -> Params:
        """The engine's parameters for a body; see `params.params_of`."""
        return params_of(body, self.default_params, self.max_model_len, form, **further)

    def submit(
        self, prompts: Sequence[TokenPrompt], params: Params, body: Sampling, form_param: str | None = None
    ) -> Reply:
        """Hand tokenized prompts to the engine; ApiError for what can never fit, before anything waits.

        Args:
            form_param: The body's name for what gives the output its form.
        """
        if isinstance(params, BeamSearchParams):
            name, width = "beam_width", params.beam_width
        else:
            name, width = "n", params.n
        if width > self.config.max_n:
            raise invalid(name, f"{name}={width} is above {self.config.max_n} (max_n): ask for fewer")
        num_tokens = []
        for prompt in prompts:
            length = len(prompt.token_ids)
            if length >= self.max_model_len:
                raise ApiError(
                    400, f"the prompt has {length} tokens, but max_model_len is {self.max_model_len} and at least one "
                    "token is to be generated: shorten the prompt", param="prompt", code="context_length_exceeded",
                )
            room = self.max_model_len - length
            num_tokens.append(length + width * min(room, params.max_tokens or room))
        reply = self.engine.submit(
            [
                {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids, "cache_salt": body.cache_salt}
                for prompt in prompts
            ],
            params,
            num_tokens=num_tokens,
            priority=body.priority,
            is_streamed=body.stream,
            request_id=body.request_id,
        )
        if form_param is not None:
            reply.form_param = form_param
        return reply

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def num_choices(body: Sampling) -> int:
    """Choices that a prompt gets."""
    return body.n or (body.beam_width if body.use_beam_search and body.beam_width else 1)


def checked(output: RequestOutput, body: Sampling) -> RequestOutput:
    """The output, of a search the best hypotheses asked for. ApiError if the request ended without its answer."""
    for one in output.outputs:
        if one.finish_reason == "error":
            raise ApiError(500, f"the request failed: {one.stop_reason}", code="generation_failed")
        if one.finish_reason == "abort":
            raise ApiError(500, "the request was aborted", code="aborted")
    if len(output.outputs) > num_choices(body):
        return dataclasses.replace(output, outputs=output.outputs[: num_choices(body)])
    return output


def usage_of(outputs: Sequence[RequestOutput], *, has_output: bool = True) -> dict[str, Any]:
    """OpenAI's `usage`. Without `has_output`, the token that the engine had to make is not the client's."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(one.token_ids) for output in outputs for one in output.outputs) if has_output else 0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
