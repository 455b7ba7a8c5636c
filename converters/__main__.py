"""The converter script: `python -m converters SRC DST`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from converters.formats import convert
from converters.sources import FORMATS, NATIVE
from jaxpaged.interrupts import insistent_interrupts
from jaxpaged.models.config import DTYPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print a table of what was done, and return 0; or print one line that says what is wrong, return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m converters",
        description="Convert a checkpoint: Hugging Face (safetensors), native or Orbax, to any of these.",
    )
    parser.add_argument("source", help="the folder of a model, of any of these formats")
    parser.add_argument("target", help="the folder to write; it appears complete or not at all")
    parser.add_argument("--to", choices=FORMATS, default=NATIVE, help=f"format of the target (default: {NATIVE})")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="what to keep weights as (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that format")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    chosen = parser.parse_args(arguments)
    before = _identity(chosen.target)
    try:
        with insistent_interrupts(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            report = convert(
                chosen.source,
                chosen.target,
                to=chosen.to,
                dtype=chosen.dtype,
                overwrite=chosen.overwrite,
                show_progress=not chosen.quiet,
            )
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        was_too_late = _identity(chosen.target) != before
        print("error: interrupted,", "when all was written" if was_too_late else "nothing was written", file=sys.stderr)
        return 130
    if not chosen.quiet:
        print(report)
    return 0


def _identity(target: str) -> int | None:
    """Return what another folder of that name would have otherwise."""
    return Path(target).stat().st_ino if Path(target).exists() else None


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """Print a warning as one line, above the progress bar."""
    tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
