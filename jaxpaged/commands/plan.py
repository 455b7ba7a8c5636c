"""jaxpaged plan: what a model would take of the device."""

import argparse

from jaxpaged.commands.flags import engine_options
from jaxpaged.llm import plan_for


def run(options: argparse.Namespace, started: float) -> int:
    """The exit code."""
    print(plan_for(options.model_name, **engine_options(options)))
    return 0
