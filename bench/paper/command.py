"""What the experiments' commands have in common: a small size for tests, a seed, and what a result says of itself."""

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.record import describe_run


def make_parser(module: str, docstring: str | None) -> argparse.ArgumentParser:
    """With the flags that every experiment has: --small, --seed, --output."""
    description = (docstring or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes: proves that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    return parser


def parse_sized(
    parser: argparse.ArgumentParser, argv: Sequence[str], small: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments; with --small, `small` are the defaults of what is not given."""
    if "--small" in argv:
        parser.set_defaults(**small)
    return parser.parse_args(argv)


def describe(module: str, arguments: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The run, its device, its seed, and whether it was small."""
    device = jax.devices()[0]
    return {
        **describe_run(module, arguments),
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})",
        "seed": args.seed,
        "is_small": args.small,
    }
