"""What a measurement must say about itself: where, when, by which command, at which commit. Results are JSON files."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.worker import PROJECT_ROOT


def describe_run(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Name, date, command, commit, versions and host of this run; a bench that measures elsewhere brings its versions.

    Absolute paths in the command are cut to their last part.
    """
    shown = [part if not Path(part).is_absolute() else Path(part).name for part in arguments]
    return {
        "bench": module.removeprefix("bench."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", module, *shown]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jaxpaged", "jax", "jaxlib", "numpy")},
        "host": {"system": platform.platform(terse=True), "cpu": _cpu_name(), "num_cores": os.cpu_count()},
    }


def _version(name: str) -> str | None:
    """None of what is not installed, as a clone of this project may be."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working tree, with "+changes" where files differ from it; None outside a repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            cwd=PROJECT_ROOT, capture_output=True, text=True, check=False,
        )
    except OSError:
        return None
    return run.stdout.strip() or None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_result(result: dict[str, Any], output: Path | None) -> None:
    """Print the result as one JSON line, the last of a bench, and write it to `output` if there is one."""
    save_result(result, output)
    print(json.dumps(result), flush=True)


def save_result(result: dict[str, Any], output: Path | None) -> None:
    """Write what there is so far to `output` if there is one, so that a run that is cut short leaves it behind."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def note(text: str) -> None:
    """Tell the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)
