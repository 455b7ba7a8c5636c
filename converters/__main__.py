"""The converter script: `python -m converters SRC DST`."""

import argparse
import sys
from collections.abc import Sequence

from converters.huggingface import convert
from jaxpaged.models.config import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print a table of what was done, and return 0; or print one line that says what is wrong, return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m converters", description="Convert a Hugging Face folder (safetensors) to a native checkpoint."
    )
    parser.add_argument("source", help="the Hugging Face folder")
    parser.add_argument("target", help="the folder to write; it appears complete or not at all")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="what to keep weights as (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace a native checkpoint that is there already")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    chosen = parser.parse_args(arguments)
    try:
        report = convert(
            chosen.source,
            chosen.target,
            dtype=chosen.dtype,
            overwrite=chosen.overwrite,
            show_progress=not chosen.quiet,
        )
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    if not chosen.quiet:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
