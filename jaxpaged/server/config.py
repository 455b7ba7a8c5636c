"""The operator's choices about serving: where to listen, whom to let in, how much of what. Standard library only."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
TOOL_CALL_PARSERS = ("auto", "hermes", "llama3_json", "mistral")


def _option(default: Any, help_text: str) -> Any:
    """A field whose help text the command line and the README's table are generated from."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Choices for `jaxpaged serve`. Raises ValueError with the name, the value and the allowed range."""

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 is every network of this machine")
    port: int = _option(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = _option(None, "clients must bring this key, on every route but health")
    api_key_file: str | None = _option(None, "file with that key, which no list of processes shows")
    served_model_name: str | None = _option(None, "name of the model in the API; None is MODEL as given")
    allowed_hosts: str | None = _option(
        None, "names in the Host header that are let in, with commas between; * is any; localhost, the host listened "
        "on and addresses in digits are in any case"
    )
    tool_call_parser: str = _option(
        "auto", "how the model writes calls of functions: hermes, llama3_json, mistral; auto looks at its chat template"
    )
    max_queued_requests: int = _option(1024, "prompts in the engine at once, waiting and running; more get 429")
    max_queued_tokens: int = _option(2**22, "their prompt tokens and most output tokens; more get 429")
    max_prompts: int = _option(1024, "prompts of one completion request")
    max_n: int = _option(128, "samples of one prompt")
    max_body_bytes: int = _option(16 * MIB, "bytes of a request's body; more get 413")
    max_header_bytes: int = _option(32 * 1024, "bytes of a request's head; more get 431, or 400")
    max_headers: int = _option(100, "headers of a request; more get 431")
    header_timeout_s: float = _option(10.0, "a request's head must have come by then")
    body_timeout_s: float = _option(30.0, "a request's body must have come by then, or it gets 408")
    write_timeout_s: float = _option(30.0, "a client that reads too little for so long is cut off")
    keep_alive_s: float = _option(75.0, "an idle connection is closed after this")
    queue_timeout_s: float = _option(300.0, "a request that has waited so long to start gets 503")
    request_timeout_s: float = _option(3600.0, "a request that has taken so long is ended with an error")
    drain_timeout_s: float = _option(30.0, "after SIGTERM or Ctrl-C, running requests may take so long to end")
    step_timeout_s: float = _option(
        300.0, "when a step of the engine takes longer, its requests get an error, and health tells it hangs"
    )
    log_requests: bool = _option(True, "one JSON line on stderr for each request")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65_535),
            ("max_queued_requests", 1, 1_000_000),
            ("max_queued_tokens", 1, 2**40),
            ("max_prompts", 1, 1_000_000),
            ("max_n", 1, 16_384),
            ("max_body_bytes", 1024, 2**30),
            ("max_header_bytes", 1024, 2**20),
            ("max_headers", 8, 10_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an integer from {low} to {high}")
        for name in (option.name for option in OPTIONS if option.name.endswith("_s")):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not 0 < value <= 1e7:
                raise ValueError(f"{name}={value!r} is not allowed: it must be a number of seconds above 0")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file were both given: give one")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or self.api_key.strip() == ""):
            raise ValueError("api_key must be ASCII text that is not empty: clients send it in a header")
        if self.allowed_hosts is not None and any(mark in self.allowed_hosts for mark in "/:[ "):
            raise ValueError(
                f"allowed_hosts={self.allowed_hosts!r} is not allowed: it must be names with commas between them, "
                "without port or path, or *"
            )
        if self.tool_call_parser not in TOOL_CALL_PARSERS:
            raise ValueError(
                f"tool_call_parser={self.tool_call_parser!r} is not allowed: it must be one of "
                f"{', '.join(TOOL_CALL_PARSERS)}"
            )
        if not self.host or self.served_model_name == "":
            raise ValueError("host and served_model_name must not be empty: leave them out for the defaults")

    def read_api_key(self) -> str | None:
        """The key, from the file where one is named; None where none is asked for."""
        if self.api_key_file is None:
            return self.api_key
        try:
            key = Path(self.api_key_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file={self.api_key_file!r} cannot be read as ASCII text: {error}") from error
        if not key:
            raise ValueError(f"api_key_file={self.api_key_file!r} is empty: write the key into it")
        return key


OPTIONS = tuple(dataclasses.fields(ServerConfig))
"""The fields with their help texts, in order."""
