"""jaxpaged convert: checkpoints between formats."""

import argparse

from converters.formats import convert
from jaxpaged.llm import resolve_folder


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    source = resolve_folder(options.source)
    report = convert(
        source,
        options.target,
        to=options.to,
        dtype=options.dtype,
        overwrite=options.overwrite,
        show_progress=not options.quiet,
    )
    if not options.quiet:
        print(report)
    return 0
