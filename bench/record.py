"""What a measurement must say about itself: where, when, by which command, at which commit. Results are JSON files."""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
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


def sources_digest(patterns: Sequence[str]) -> str:
    """A digest of the project's files that fit these patterns: results of other sources are not gone on with."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in PROJECT_ROOT.glob(pattern)}):
        digest.update(path.relative_to(PROJECT_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


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
    """Write what there is so far to `output` if there is one, so that a run that is cut short leaves it behind.

    The file is replaced as a whole, so that it is one of JSON whenever the process ends.
    """
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(output.name + ".part")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(output)


def result_to_go_on_with(path: Path, identity: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The `parts` of a result in a file. ValueError where it cannot be read, lacks one, or was made of something else.

    `identity` is what a result must say of device, versions and sources.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if not isinstance(found, dict) or not set(parts) <= set(found):
        raise ValueError("it is no result of this bench")
    others = [
        f"{name} {found.get(name)!r}, not {value!r}" for name, value in identity.items() if found.get(name) != value
    ]
    if others:
        raise ValueError(f"it was made with {', '.join(others)}: leave --resume out, to begin anew")
    return {name: found[name] for name in parts}


def add_resume_flags(parser: argparse.ArgumentParser, stem: str) -> None:
    """--resume and --output of a bench that may be cut short; see `resumed`."""
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a result, to go on with what it lacks")
    parser.add_argument(
        "--output", type=Path,
        help=f"default: that of --resume; if not small, bench/results/{stem}-<device>.json",
    )  # fmt: skip


def resumed(
    parser: argparse.ArgumentParser, args: argparse.Namespace, identity: Mapping[str, Any], parts: dict[str, Any],
    default_stem: str | None,
) -> dict[str, Any]:
    """The `parts` that --resume goes on with, or those given; ends the process where that file is of no use.

    `args.output` becomes the file to write, in bench/results by default: its name is `default_stem` and the device.
    """
    try:
        found = parts if args.resume is None else result_to_go_on_with(args.resume, identity, parts)
    except ValueError as error:
        parser.error(f"--resume {args.resume}: {error}")
    if args.output is None:
        args.output = args.resume
    if args.output is None and default_stem is not None:
        device = identity["device"].replace(" ", "-")
        args.output = PROJECT_ROOT / "bench" / "results" / f"{default_stem}-{device}.json"
    return found


def note(text: str) -> None:
    """Tell the person who waits, on stderr."""
    print(text, file=sys.stderr, flush=True)
