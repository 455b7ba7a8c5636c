"""The `jaxpaged` command, which is `python -m jaxpaged` too: nothing is imported before Ctrl-C is seen to."""

import sys

from jaxpaged.interrupts import exiting_interrupts


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        with exiting_interrupts():
            from jaxpaged import cli  # noqa: PLC0415  as above
        return cli.main()
    except KeyboardInterrupt:
        print("jaxpaged: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
