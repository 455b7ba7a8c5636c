"""Where the outputs of a client's request arrive in the event loop: the newest of each prompt."""

import asyncio
from collections.abc import Sequence

from jaxpaged.engine.outputs import RequestOutput
from jaxpaged.server.errors import FORM, ApiError, about_form

Terminal = ApiError | RequestOutput


def is_terminal(event: RequestOutput | ApiError) -> bool:
    """Whether nothing follows it."""
    return isinstance(event, ApiError) or event.finished


class Reply:
    """The outputs of the prompts of one client's request. Lives in the event loop's thread.

    An output holds all that came before it, so only the newest of each prompt is kept: memory is bounded by the
    model's length, and a slow reader gets fewer and longer pieces.
    """

    def __init__(self, request_ids: Sequence[str]) -> None:
        self.request_ids = tuple(request_ids)
        self._index_of = {request_id: index for index, request_id in enumerate(self.request_ids)}
        self._latest: dict[int, RequestOutput] = {}
        self._error: ApiError | None = None
        self._unfinished = set(self.request_ids)
        self._has_news = asyncio.Event()
        self.form_param = FORM
        """The client's name for what errors may say of the form of the output."""

    @property
    def unfinished_ids(self) -> frozenset[str]:
        """Prompts whose terminal event has not come."""
        return frozenset(self._unfinished)

    def put(self, request_id: str, event: RequestOutput | ApiError) -> None:
        """Take an event of one prompt; after its terminal one there is none."""
        assert request_id in self._unfinished, f"{request_id} had ended"
        if is_terminal(event):
            self._unfinished.discard(request_id)
        if isinstance(event, ApiError):
            self._error = self._error or about_form(event, self.form_param)
        else:
            self._latest[self._index_of[request_id]] = event
        self._has_news.set()

    async def next(self) -> dict[int, RequestOutput]:
        """Wait for news: the newest output by the prompt's index. ApiError if one of the prompts came to nothing."""
        await self._has_news.wait()
        self._has_news.clear()
        if self._error is not None:
            raise self._error
        latest, self._latest = self._latest, {}
        return latest

    async def finished(self) -> list[RequestOutput]:
        """Wait for the ends of all prompts, in their order."""
        ends: dict[int, RequestOutput] = {}
        while len(ends) < len(self.request_ids):
            news = await self.next()
            ends.update({index: output for index, output in news.items() if output.finished})
        return [ends[index] for index in range(len(self.request_ids))]
