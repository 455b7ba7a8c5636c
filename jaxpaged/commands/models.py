"""jaxpaged models: the support matrix."""

import argparse

from jaxpaged.models.registry import support_matrix


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    print(support_matrix())
    return 0
