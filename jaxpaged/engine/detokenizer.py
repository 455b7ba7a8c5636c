"""Token ids of one sequence, one at a time, to text that never has to be taken back.

Three things stand between a token and its text: a character may be spread over several tokens; whether a token starts
with a space may depend on the one before it; and the text may turn out to be the beginning of a stop string. So a few
tokens are decoded together, and what may still change is held back.

Decisions
1. 2026-11-23. The window of tokens is kept here and decoded by `Tokenizer.decode`, not by `tokenizers`' DecodeStream:
   same cost (two short decodes a token), but that one repeats the whole prompt in the output if the prompt
   ends inside a character, raises on byte tokens that form no character, and grows without bound on skipped tokens.
2. 2026-11-23. Where several stop strings match, the one that is complete first ends the text (of two that end
   together, the longer one), so the result does not depend on how the text was cut into tokens.
"""

from collections.abc import Sequence

from jaxpaged.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What an incomplete or wrong character decodes to."""
PROMPT_TAIL = 8
"""Tokens of the prompt that are decoded along with the first tokens of the output."""
MAX_PENDING = 8
"""Tokens that may wait for the rest of a character; one takes four bytes, so more are no character at all."""


class Detokenizer:
    """The text of one sequence.

    Args:
        prompt_token_ids: What the output continues: its last tokens decide about a space in front.
        stop: The text ends before the first of these (behind it with `include_stop_str_in_output`).
        skip_special_tokens: Leave out the text of special tokens.
        min_tokens: Stop strings are looked for behind this many tokens only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._silent = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        # window: the tokens decoded together = num_read ones whose text is out (the prefix), then the pending ones
        self._window = self._tail_of(prompt_token_ids)
        self._num_read = len(self._window)
        self._prefix = self._decode(self._window)
        self._search = _StopSearch(stop)
        self._include_stop = include_stop_str_in_output
        self._num_tokens_before_search = min_tokens
        self._parts: list[str] = []
        self._held = ""
        self.stop_reason: str | None = None
        """The stop string that ended the text."""

    @property
    def text(self) -> str:
        """Everything that `append` and `finish` have returned."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_id: int) -> str:
        """Take the next token; returns the new text, which may be empty. Nothing follows a stop string."""
        if self.stop_reason is not None:
            return ""
        is_searched = self._num_tokens_before_search <= 0
        self._num_tokens_before_search -= 1
        if token_id in self._silent:
            return ""
        self._window.append(token_id)
        whole = self._decode(self._window)
        end = self._stable_end(whole)
        if end == self._num_read:
            return ""
        if end < len(self._window):
            whole = self._decode(self._window[:end])
        return self._show(self._advance(end, whole), is_searched)

    def finish(self) -> str:
        """No token follows: returns the text that was held back."""
        if self.stop_reason is not None:
            return ""
        is_searched = self._num_tokens_before_search <= 0
        shown = self._show(self._advance(len(self._window), self._decode(self._window)), is_searched)
        rest, self._held = self._held, ""
        if rest:
            self._parts.append(rest)
        return shown + rest

    # ---- tokens to text

    def _decode(self, token_ids: list[int]) -> str:
        # special tokens that are to be skipped never enter the window
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""

    def _tail_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last visible tokens of the prompt, more of them if they seem to start inside a character."""
        length = PROMPT_TAIL
        while True:
            tail = [token_id for token_id in prompt_token_ids[-length:] if token_id not in self._silent]
            is_whole = length >= len(prompt_token_ids) or length >= 8 * PROMPT_TAIL
            if is_whole or (tail and not self._decode(tail).endswith(REPLACEMENT)):
                return tail
            length *= 2

    def _stable_end(self, whole: str) -> int:
        """How many tokens of the window, which decodes to `whole`, have text that later tokens cannot change."""
        window = self._window
        if whole != self._prefix and not whole.endswith(REPLACEMENT):
            return len(window)
        num_pending = len(window) - self._num_read
        if num_pending <= MAX_PENDING:
            return self._num_read
        if whole == self._prefix:  # tokens without text: forget them
            del window[self._num_read :]
            return self._num_read
        # No character is this long. Cut where the two sides decode alone to what they are together: not inside one.
        for end in range(len(window) - 1, len(window) - 5, -1):
            if self._decode(window[:end]) + self._decode(window[end:]) == whole:
                return end
        return self._num_read if num_pending <= 2 * MAX_PENDING else len(window)

    def _advance(self, end: int, whole: str) -> str:
        """What the pending tokens before `end` add; they become the new prefix. `whole`: the window up to `end`."""
        prefix = self._prefix
        if whole.startswith(prefix):
            new = whole[len(prefix) :]
        elif prefix.endswith(REPLACEMENT):  # the prompt ended inside a character, which is complete now
            new = whole[len(prefix.rstrip(REPLACEMENT)) :]
        else:  # byte tokens that spoil the character before them, whose text is out
            new = self._decode(self._window[self._num_read : end])
        if end > self._num_read:
            del self._window[: self._num_read]
            self._num_read = end - self._num_read
            self._prefix = self._decode(self._window[: self._num_read])
        return new

    # ---- stop strings

    def _show(self, new: str, is_searched: bool) -> str:
        """Add decoded text, up to a stop string or to the beginning of what may become one; returns what is shown."""
        text = self._held + new
        num_shown = len(text)
        if is_searched:
            match = self._search.feed(new)
            if match is not None:
                self.stop_reason, end = match
                num_shown = len(self._held) + end - (0 if self._include_stop else len(self.stop_reason))
            elif not self._include_stop:
                num_shown -= self._search.num_open
        self._held = "" if self.stop_reason is not None else text[num_shown:]
        shown = text[:num_shown]
        if shown:
            self._parts.append(shown)
        return shown


class _StopSearch:
    """Looks for several strings in a stream of text; each character is looked at once for each string."""

    def __init__(self, stop: Sequence[str]) -> None:
        # the longest first, so that of two that end together it is the one found
        self._matchers = [_Matcher(string) for string in sorted(set(stop), key=len, reverse=True)]

    def feed(self, text: str) -> tuple[str, int] | None:
        """(stop string, where it ends in `text`) of the first one that is complete, or None."""
        first: tuple[str, int] | None = None
        for matcher in self._matchers:
            end = matcher.feed(text)
            if end is not None and (first is None or end < first[1]):
                first = (matcher.string, end)
        return first

    @property
    def num_open(self) -> int:
        """How many of the last characters may become a stop string."""
        return max((matcher.num_matched for matcher in self._matchers), default=0)


class _Matcher:
    """Knuth, Morris and Pratt (1977, "Fast pattern matching in strings"), with the table of borders made as needed.

    `num_matched` is the length of the longest end of the text so far that begins `string`.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        self._borders = [0, 0]
        """borders[k]: the longest proper beginning of string[:k] that also ends it."""

    def feed(self, text: str) -> int | None:
        """Where `string` ends in `text` for the first time, or None."""
        string, borders, matched, at = self.string, self._borders, self.num_matched, 0
        while at < len(text):
            if matched == 0:
                at = text.find(string[0], at)
                if at < 0:
                    break
            while matched and string[matched] != text[at]:
                matched = borders[matched]
            if string[matched] == text[at]:
                matched += 1
                if matched == len(string):
                    return at + 1
                if matched == len(borders):
                    self._add_border()
            at += 1
        self.num_matched = matched
        return None

    def _add_border(self) -> None:
        string, borders = self.string, self._borders
        last = string[len(borders) - 1]
        border = borders[-1]
        while border and string[border] != last:
            border = borders[border]
        borders.append(border + 1 if string[border] == last else 0)
