"""jaxpaged serve: an HTTP server."""

import argparse
import sys

from jaxpaged.commands.flags import engine_options
from jaxpaged.llm import LLM, engine_config_from, resolve_folder
from jaxpaged.server.config import OPTIONS, ServerConfig
from jaxpaged.server.process import serve


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    if options.model_name is not None and options.model != "demo":
        raise ValueError("the model was given twice: as MODEL and as --model")
    model = options.model_name or options.model
    names = [option.name for option in OPTIONS]
    config = ServerConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})
    given = engine_options(options, without=())
    engine_config_from(given)  # a bad value is refused before anything is loaded
    resolve_folder(model)
    is_watched = sys.stderr.isatty()  # bars are for people; the log is for both
    return serve(
        model, lambda: LLM(model, tokenizer=options.tokenizer, show_progress=is_watched, **given), config
    )
