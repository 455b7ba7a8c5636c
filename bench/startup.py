"""How long does a start take, cold and warm, from the process to the first token, and where does the time go?

Each start is a process of its own. Cold: nothing that this project or jax compiled for the user is kept (the process
has an empty home, where both keep it); warm: the next start in the same home. Files of the model and of Python are in
the page cache in both, so that no disk is measured. Bound by compiling when cold, by imports and loading when warm.

    jaxpaged bench startup --model path/to/model --repeats 3
"""

import argparse
import json
import os
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.model_flags import add_model_flags, make_parser
from bench.record import describe_run, write_result
from bench.worker import PROJECT_ROOT
from jaxpaged.commands.flags import engine_options
from jaxpaged.llm import engine_config_from, resolve_folder

LABELS = {
    "interpreter_s": "interpreter",
    "imports_s": "imports",
    "device_s": "finding the device",
    "load_s": "loading weights",
    "engine_s": "engine (C++ kernels, memory plan, tokenizer)",
    "compile_s": "compiling, or reading what was compiled",
    "ready_s": "ready",
    "first_token_s": "prompt to first token",
    "total_s": "start to first token",
}
SUMS = ("ready_s", "total_s")
"""Rows that are sums of those above."""
KEPT_BY_JAX = "JAX_COMPILATION_CACHE_DIR"


def start(model: Path, args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """One start in this home. RuntimeError with the process's last words where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != KEPT_BY_JAX}
    # packages that were installed for the user alone are found as before
    environment |= {"HOME": str(home), "PYTHONUSERBASE": site.getuserbase(), "PYTHONPATH": _python_path()}
    options = engine_options(args)
    if args.tokenizer is not None:
        options["tokenizer"] = str(Path(args.tokenizer).expanduser().resolve())
    given = {"model": str(model), "options": options, "is_all": args.all_buckets, "spawned_s": time.monotonic()}
    run = subprocess.run(
        [sys.executable, "-m", "bench.startup_worker", json.dumps(given)], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        raise RuntimeError(f"a start failed: {lines[-1] if lines else f'exit code {run.returncode}'}")
    found = json.loads(run.stdout.splitlines()[-1])
    found["parts"] = with_sums(found["parts"])
    return found


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH")
    return str(PROJECT_ROOT) + (os.pathsep + given if given else "")


def with_sums(parts: dict[str, float]) -> dict[str, float]:
    """The parts in order, with the time until it was ready and until the first token."""
    ready_s = sum(value for name, value in parts.items() if name != "first_token_s")
    sums = {"ready_s": ready_s, "total_s": ready_s + parts["first_token_s"]}
    return {name: (parts | sums)[name] for name in LABELS}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each part, and the extremes of the whole."""
    totals = [run["parts"]["total_s"] for run in runs]
    return {
        **{name: statistics.median(run["parts"][name] for run in runs) for name in LABELS},
        "min_total_s": min(totals), "max_total_s": max(totals), "num_runs": len(runs),
    }  # fmt: skip


def print_report(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{result['model']} {result['dtype']} on {result['device']}, medians of {result['cold']['num_runs']}")
    print(f"{'seconds':46}{'cold':>9}{'warm':>9}")
    for name, label in LABELS.items():
        mark = "= " if name in SUMS else ""
        print(f"{mark + label:46}{result['cold'][name]:9.2f}{result['warm'][name]:9.2f}")
    print(f"start to first token: {result['cold']['min_total_s']:.2f} to {result['cold']['max_total_s']:.2f} s cold, "
          f"{result['warm']['min_total_s']:.2f} to {result['warm']['max_total_s']:.2f} s warm")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("startup", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="cold starts, and warm ones (default: 3)")
    parser.add_argument(
        "--all-buckets", action="store_true", help="compile all that any request can reach, as a server does, instead "
        "of what one prompt needs",
    )  # fmt: skip
    add_model_flags(parser, with_seed=False)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    engine_config_from(engine_options(args))  # a bad value is refused before anything is started
    model = resolve_folder(args.model).resolve()
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with tqdm(total=2 * args.repeats, desc="Starts", unit="start", disable=args.quiet, leave=False) as bar:
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="bench-startup-") as home:
                for kind in runs:
                    runs[kind].append(start(model, args, Path(home)))
                    bar.update()
    result = {
        **describe_run("bench.startup", arguments),
        "model": model.name, "device": runs["cold"][0]["device"], "dtype": runs["cold"][0]["dtype"],
        "has_all_buckets": args.all_buckets, "engine_options": engine_options(args),
        **{kind: summarize(found) for kind, found in runs.items()},
        "runs": {kind: [one["parts"] for one in found] for kind, found in runs.items()},
        "num_compiles_after_warmup": max(one["num_compiles_after_warmup"] for found in runs.values() for one in found),
    }  # fmt: skip
    print_report(result)
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
