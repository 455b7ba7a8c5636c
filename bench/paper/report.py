"""One HTML file with the paper's experiments as measured here, beside the paper's figures, for readers of neither.

It draws the results that it finds, and says which are missing; nothing in it refers to anything outside the file.

    python -m bench.paper.report --results bench/results -o report.html
    python -m bench.paper.report --run small -o report.html
"""

import argparse
import html
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.plots import PlotsMissingError
from bench.paper.sections import SECTIONS, Section
from bench.record import describe_run, note
from bench.worker import PROJECT_ROOT

EXPERIMENTS = tuple(dict.fromkeys(section.bench for section in SECTIONS))
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color:#1d2430;
background:#fff}h2{margin-top:2.5rem;border-top:1px solid #dde1e7;padding-top:1.5rem}svg{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}td,th{padding:.2rem .6rem;
text-align:right;border-bottom:1px solid #e6e8ec}td:first-child,th:first-child{text-align:left}
.run,.not{color:#5b6770;font-size:.85rem}
.warning{background:#fdf1d8;padding:.5rem .8rem}figure{margin:1rem 0}figcaption{font-size:.85rem;color:#5b6770}
code{overflow-wrap:anywhere}"""
INTRODUCTION = """A language model that serves many requests keeps, for every token it has read or written, keys and
values in memory. Earlier systems reserved one contiguous piece for each request, as long as it might become;
PagedAttention (Kwon and others, SOSP 2023, arXiv 2309.06180) cuts the memory into small blocks and gives a
request a block when it needs one, as operating systems page memory. The paper asks what that is worth. Here its
experiments are made again with this engine: the memory policies run in one engine with the same kernels and the
same order of requests, so that nothing but the policy differs. The paper's system ran models of 13 billion
parameters and more on A100 GPUs; compare ratios, not absolute figures.
"""


def find_results(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """File and content for each experiment: the file named after it, or the newest of it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with results, or --run small to make them")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.name} is no JSON ({error}): make it again, or move it away") from error
        name = str(result.get("bench", "")).removeprefix("paper.") if isinstance(result, dict) else ""
        if name not in EXPERIMENTS:
            continue
        is_better = name not in found or path.stem == name or (
            found[name][0].stem != name and result["date"] > found[name][1]["date"]
        )
        if is_better:
            found[name] = path, result
    return found


def told_run(path: Path, result: dict[str, Any]) -> str:
    """Where, when, by which command, at which commit."""
    host, versions = result["host"], result.get("versions", {})
    facts = [
        f"<code>{html.escape(result['command'])}</code>", f"file {html.escape(path.name)}", result["date"],
        f"commit {result['commit']}", f"{host['cpu']}, {host['num_cores']} cores", f"Python {result['python']}",
        *([f"device {result['device']}"] if "device" in result else []),
        *(f"{name} {version}" for name, version in versions.items()), f"seed {result.get('seed', 'not told')}",
    ]  # fmt: skip
    warning = ""
    if result.get("is_small"):
        warning = '<p class="warning">A small run: it proves that the experiment runs, its figures mean nothing.</p>'
    return f'{warning}<p class="run">{"; ".join(facts)}.</p>'


def told_section(section: Section, found: dict[str, tuple[Path, dict[str, Any]]]) -> str:
    """A section; without a result, what would make one."""
    parts = [
        f'<section id="{section.key}"><h2>{section.title}</h2>',
        f"<p><b>What is asked.</b> {section.asked} ({section.figure} of the paper.)</p>",
        f"<p><b>How it is measured.</b> {section.how}</p>",
    ]
    if section.bench not in found:
        command = f"jaxpaged bench paper-{section.bench.replace('_', '-')} --output results/{section.bench}.json"
        parts.append(f'<p class="warning">Not measured: there is no result. <code>{command}</code> makes one.</p>')
    else:
        path, result = found[section.bench]
        content = section.content(result)
        parts += [f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in content.plots]
        parts += [content.table.html(), f"<p><b>What it means.</b> {content.meaning}</p>", told_run(path, result)]
    parts.append(f'<p class="not"><b>Not measured here.</b> {section.not_measured}</p></section>')
    return "\n".join(parts)


def make_page(found: dict[str, tuple[Path, dict[str, Any]]], failures: dict[str, str]) -> str:
    """The whole file."""
    run = describe_run("bench.paper.report", [])
    missing = [name for name in EXPERIMENTS if name not in found]
    notes = [f"No result of: {', '.join(missing)}."] if missing else []
    notes += [f"{name} failed: {html.escape(reason)}" for name, reason in failures.items()]
    return "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>PagedAttention, measured</title><style>{STYLE}</style></head><body><h1>PagedAttention, measured</h1>",
        f"<p>{INTRODUCTION}</p><p class='run'>Page made {run['date']} at commit {run['commit']}.</p>",
        *(f'<p class="warning">{text}</p>' for text in notes),
        *(told_section(section, found) for section in SECTIONS),
        "</body></html>\n",
    ])  # fmt: skip


def run_experiments(folder: Path, names: Sequence[str], *, is_small: bool) -> dict[str, str]:
    """Run each in a process of its own; the last line of those that failed."""
    failures = {}
    for name in names:
        command = [sys.executable, "-m", f"bench.paper.{name}", "--output", str((folder / f"{name}.json").resolve())]
        note(f"{name} ...")
        start = time.perf_counter()
        done = subprocess.run(
            command + ["--small"] * is_small, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            failures[name] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        note(f"{name}: {failures.get(name, 'done')} ({time.perf_counter() - start:.0f} s)")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Make the page; the exit status is 1 where an experiment failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, help="folder of results; default: bench/results, a new one for small")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--run", choices=["small", "full"], help="run the experiments first, for minutes or an hour")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="of those that run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-report-") as scratch:
        folder = args.results or (Path(scratch) if args.run == "small" else PROJECT_ROOT / "bench" / "results")
        failures: dict[str, str] = {}
        if args.run is not None:
            folder.mkdir(parents=True, exist_ok=True)
            failures = run_experiments(folder, args.only, is_small=args.run == "small")
        try:
            found = find_results(folder)
            page = make_page(found, failures)
        except PlotsMissingError as error:
            raise ValueError(str(error)) from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page)
    print(f"{args.output}: {len(found)} of {len(EXPERIMENTS)} experiments")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
