"""jaxpaged batch: a file of requests."""

import argparse

from jaxpaged.commands.flags import engine_options
from jaxpaged.llm import LLM
from jaxpaged.server.batch import run_batch


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    given = engine_options(options, without=())
    return run_batch(
        options.requests,
        options.output,
        load=lambda: LLM(
            options.model, tokenizer=options.tokenizer, show_progress=not options.quiet, **given
        ),
        model_name=options.served_model_name or options.model,
        is_resumed=options.resume,
        is_overwriting=options.overwrite,
        is_quiet=options.quiet,
    )
