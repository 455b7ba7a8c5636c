"""A checkpoint's tokenizer: text and conversations in, token ids out, and back.

Decisions
1. 2026-11-23. tokenizer.json is read by the `tokenizers` library, and transformers is imported only where a caller asks
   for its object or a folder has no tokenizer.json: the first takes 0.1 s, importing AutoTokenizer 2 to 5 s.
2. 2026-11-23. Special tokens typed by a user are text unless the caller says otherwise; those of a chat template are
   tokens. In a conversation the typed ones are replaced by placeholders before the template sees them.
"""

import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from jaxpaged.engine.chat_template import ChatTemplate, Messages, Placeholders, check_messages

SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
"""Files a tokenizer can be made from; the first without transformers."""


class Tokenizer:
    """The tokenizer of one model folder. Encoding is safe from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self._lock = threading.Lock()  # guards the backend's encode_special_tokens
        self._special_tokens = _named_tokens(config)
        _add_missing_tokens(backend, config, self._special_tokens)
        _set_ends(backend, config, self._special_tokens)
        # settings of the training run, which would cut or fill prompts
        backend.no_truncation()
        backend.no_padding()
        self._special = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_token_ids: frozenset[int] = frozenset(self._special)
        self._special_pattern = re.compile(
            "|".join(re.escape(t.content) for t in sorted(self._special.values(), key=lambda t: -len(t.content)))
            or r"(?!)"  # no special tokens: matches nowhere
        )
        source = _chat_template_source(folder, config)
        self._chat_template = None if source is None else ChatTemplate(source, self._special_tokens)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer in a local folder. Raises ValueError if there is none; nothing is ever downloaded or run."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give one with a tokenizer.json in it")
        config = _read_json(folder / "tokenizer_config.json")
        if not config:
            config = _read_json(folder / "special_tokens_map.json")
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise ValueError(f"{path} is not a tokenizer: {error}. Copy it again from its source") from error
        elif any((folder / name).is_file() for name in SOURCES):
            backend = _backend_of_transformers(folder)
        else:
            raise ValueError(
                f"{folder} has no tokenizer: looked for {', '.join(SOURCES)}. Copy the model's tokenizer files there, "
                "or name the folder that has them with tokenizer=..."
            )
        return cls(backend, config, folder)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's own may be larger, as it is often padded."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def largest_token_id(self) -> int:
        """The largest id that a text can get, or that a token's name stands for."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def check_fits(self, vocab_size: int) -> None:
        """Raise ValueError if a token has an id that a model of so many tokens does not know."""
        largest = self.largest_token_id
        if largest >= vocab_size:
            raise ValueError(
                f"the tokenizer in {self._folder} does not fit the model: it has ids up to {largest}, and the model "
                f"knows {vocab_size} tokens (ids from 0 to {vocab_size - 1}): name the folder of the model's own "
                "tokenizer with tokenizer=..., or copy its files into the model's folder"
            )

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token; generation_config.json may name others besides."""
        token_id = self._id_of("eos_token")
        return () if token_id is None else (token_id,)

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: Put what the model expects around a prompt, as a beginning-of-sequence token.
            split_special_tokens: Read a special token's name in the text as plain text. False is for text that the
                caller vouches for.

        Raises ValueError for text that has no UTF-8 form, and for a prompt without a single token.
        """
        _check_text(text)
        with self._lock:
            self._backend.encode_special_tokens = split_special_tokens
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids and add_special_tokens:
            raise ValueError(f"the prompt {text[:80]!r} has no tokens: give at least one character")
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; those outside the vocabulary have none."""
        try:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise ValueError("token ids must be integers from 0 to 4294967295") from error

    def bad_words_token_ids(self, words: Iterable[str]) -> list[list[int]]:
        """The token sequences that stand for words: at the start of a text, and behind a space where that differs.

        A tokenizer may cut a word differently behind a space ("s|ir" and " sir"), so both are listed, whatever their
        lengths; not where the second only ends with the first, which bans it already.
        """
        sequences: list[list[int]] = []
        for word in words:
            stripped = word.lstrip()
            plain = self._encode_word(stripped, word)
            sequences.append(plain)
            spaced = self._encode_word(" " + stripped, word)
            if spaced[-len(plain) :] != plain:
                sequences.append(spaced)
        return sequences

    def _encode_word(self, text: str, word: str) -> list[int]:
        ids = self.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"bad_words entry {word!r} has no tokens: give a word with at least one visible character")
        return ids

    # ---- conversations

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @property
    def chat_template_source(self) -> str | None:
        """The text of the template; None where there is none."""
        return None if self._chat_template is None else self._chat_template.source

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The text of each special token, which outputs leave out unless that is asked for."""
        return tuple(token.content for token in self._special.values())

    def encode_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation through the model's chat template; special tokens in messages are plain text.

        Args:
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further names for the template, such as `enable_thinking`.
        """
        for name in (*(() if tools is None else ("tools",)), *variables):
            if self._chat_template is not None and not self._chat_template.reads(name):
                raise ValueError(f"{name}: the model's chat template does not read it: leave it out")
        values = {"messages": check_messages(messages), "tools": tools, **variables}
        placeholders = Placeholders([token.content for token in self._special.values()], values)
        text = self._render(placeholders.hide(values), add_generation_prompt)
        _check_text(text)
        if placeholders:
            return self._encode_hidden(text, placeholders)
        return self.encode(text, add_special_tokens=False, split_special_tokens=False)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, for people to read: in it, typed special tokens look like the template's."""
        return self._render({"messages": check_messages(messages), **variables}, add_generation_prompt)

    def _render(self, values: dict[str, Any], add_generation_prompt: bool) -> str:
        if self._chat_template is None:
            raise ValueError(
                f"the model in {self._folder} has no chat template: use generate() with a prompt written out, or add a "
                "chat_template.jinja to the folder"
            )
        return self._chat_template.render(**values, add_generation_prompt=add_generation_prompt)

    def _encode_hidden(self, text: str, placeholders: Placeholders) -> list[int]:
        """Encode piece by piece between the template's special tokens; the pieces have the typed ones in them."""
        ids: list[int] = []
        ids_by_content = {token.content: token_id for token_id, token in self._special.items()}
        at, is_stripped = 0, False

        def add(piece: str) -> None:
            piece = placeholders.restore(piece.lstrip() if is_stripped else piece)
            if piece:
                ids.extend(self.encode(piece, add_special_tokens=False, split_special_tokens=True))

        for match in self._special_pattern.finditer(text):
            token_id = ids_by_content[match.group()]
            piece = text[at : match.start()]
            add(piece.rstrip() if self._special[token_id].lstrip else piece)
            ids.append(token_id)
            at, is_stripped = match.end(), self._special[token_id].rstrip
        add(text[at:])
        return ids

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json, as it is used here."""
        return self._backend.to_str()

    def as_transformers(self) -> Any:
        """The same tokenizer as a transformers object."""
        return _load_transformers(self._folder)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which no "
            "token can stand for: remove it, or decode its source as UTF-8"
        ) from error


# ---- reading a folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy it again from its source") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _content_of(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, by name."""
    named = {name: _content_of(value) for name, value in config.items() if name.endswith("_token")}
    return {name: content for name, content in named.items() if content}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the special tokens that tokenizer_config.json has and tokenizer.json lacks, as transformers does."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    missing: dict[str, AddedToken] = {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        set_flags = {flag: entry[flag] for flag in flags if flag in entry}
        missing[entry["content"]] = AddedToken(entry["content"], **set_flags)
    for content in named.values():
        missing.setdefault(content, AddedToken(content, special=True))
    missing = {content: token for content, token in missing.items() if content not in present}
    if missing:
        backend.add_tokens(list(missing.values()))


def _set_ends(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Follow add_bos_token and add_eos_token where tokenizer_config.json has them: they overrule tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        pair=None,
        special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos) if token],
    )


def _chat_template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _load_transformers(folder: Path) -> Any:
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_not_about_torch)
    from transformers import AutoTokenizer  # noqa: PLC0415  seconds to import, and rarely needed

    logger.removeFilter(_is_not_about_torch)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything, from a missing package to a wrong file
        raise ValueError(f"transformers cannot load the tokenizer in {folder}: {error}") from error


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    """Transformers warns as it is imported where torch is absent; a tokenizer does not need it."""
    return "PyTorch was not found" not in record.getMessage()


def _backend_of_transformers(folder: Path) -> tokenizers.Tokenizer:
    backend = getattr(_load_transformers(folder), "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(
            f"the tokenizer in {folder} runs in Python only: save it once as tokenizer.json (transformers' "
            "save_pretrained of its fast form)"
        )
    return backend
