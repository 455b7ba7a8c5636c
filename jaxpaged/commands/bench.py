"""jaxpaged bench: one of the benches, with its own flags."""

import argparse
import importlib
from typing import Any

from bench import VERBS


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    if options.bench not in VERBS:
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in VERBS.items()]
        what = "which bench?" if options.bench is None else f"{options.bench!r} is no bench;"
        raise ValueError(f"{what} choose one of these, and see its flags with --help:\n" + "\n".join(lines))
    module: Any = importlib.import_module(VERBS[options.bench][0])
    return int(module.main(options.arguments))
