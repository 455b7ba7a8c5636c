"""jaxpaged chat: a conversation, line by line."""

import argparse
import sys
from typing import Any

from jaxpaged.commands.flags import sampling_params
from jaxpaged.commands.generate import load, print_stream


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    params = sampling_params(options)
    llm, _ = load(options, started)
    messages: list[dict[str, str]] = []
    if options.system:
        messages.append({"role": "system", "content": options.system})
    tokenizer = llm.engine.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        raise ValueError(
            f"model {options.model!r} has no chat template: use `jaxpaged generate`, or a model that was tuned to chat"
        )
    max_model_len = llm.engine.max_model_len
    if sys.stdin.isatty() and not options.quiet:
        seed = f"; seed {params.seed}" if params.temperature > 0 else ""
        print(f"[a line is a message to the model; Ctrl-D ends the conversation{seed}]", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if not any(message["role"] == "user" for message in messages):
                print("jaxpaged: there was no message: a line of text is one", file=sys.stderr)
            print()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        kept, prompt_token_ids = _fit_conversation(tokenizer, messages, max_model_len, options.max_tokens)
        if len(prompt_token_ids) >= max_model_len:
            print(
                f"jaxpaged: this message does not fit into the model's context: with what stands around it, it has "
                f"{len(prompt_token_ids)} tokens, and max_model_len is {max_model_len}; send a shorter one",
                file=sys.stderr,
            )
            del messages[-1]
            continue
        if len(kept) < len(messages):
            turns = (len(messages) - len(kept)) // 2
            print(
                f"jaxpaged: the conversation has outgrown the model's context (max_model_len={max_model_len}): its "
                f"oldest {'turn is' if turns == 1 else f'{turns} turns are'} forgotten",
                file=sys.stderr,
            )
        messages = kept
        output = print_stream(llm, {"prompt_token_ids": prompt_token_ids}, params, is_echoed=False)
        messages.append({"role": "assistant", "content": output.outputs[0].text})


def _fit_conversation(
    tokenizer: Any, messages: list[dict[str, str]], max_model_len: int, max_tokens: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation without its oldest turns where it has outgrown the context, and its token ids.

    The system message and the last message stay, whether or not they fit. The answer is left `max_tokens`, or half
    the context if that is less.
    """
    room = max_model_len - min(max_tokens, max_model_len // 2)
    num_system = 1 if messages[0]["role"] == "system" else 0
    for start in range(num_system, len(messages), 2):
        kept = messages[:num_system] + messages[start:]
        prompt_token_ids = tokenizer.encode_chat(kept, add_generation_prompt=True)
        if len(prompt_token_ids) <= room:
            break
    return kept, prompt_token_ids
