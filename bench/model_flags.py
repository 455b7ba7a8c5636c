"""Flags of the benches that measure a model of the user's in the offline engine, and its loading."""

import argparse
from pathlib import Path
from typing import Any

from bench.engine_worker import EngineWorker
from jaxpaged.commands.flags import add_engine_flags, engine_options
from jaxpaged.llm import engine_config_from, resolve_folder


def make_parser(verb: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser that tells the bench's question."""
    question = (docstring or "").partition("\n")[0]
    return argparse.ArgumentParser(prog=f"jaxpaged bench {verb}", description=question, allow_abbrev=False)


def add_model_flags(parser: argparse.ArgumentParser, *, with_seed: bool = True) -> None:
    """The model, every option of the engine, the output."""
    if with_seed:
        parser.add_argument("--seed", type=int, default=0, help="of prompts (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    add_engine_flags(parser)


def load(worker: EngineWorker, args: argparse.Namespace) -> dict[str, Any]:
    """Load the model that the flags name; what is known of it then, for the result."""
    options = engine_options(args)
    max_num_seqs = engine_config_from(options).max_num_seqs
    if args.tokenizer is not None:
        options["tokenizer"] = args.tokenizer
    facts = worker.load(
        args.model, dtype=options.pop("dtype", "auto"), options=options, show_progress=not args.quiet
    )
    name = resolve_folder(args.model).resolve().name
    return {"model": name, **facts, "max_num_seqs": max_num_seqs, "engine_options": options}
