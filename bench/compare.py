"""What changed between two results of one bench: which numbers, by how much, for the better or the worse?

Reads files of `--output`; where the bench is `serve`, result files of `vllm bench serve` too. A number is a metric if
its name says what is good: rates and counts of successes should be high; times, errors and memory low. Whatever else
differs (device, shape, versions, flags) is told first, because a ratio may be its doing.

    jaxpaged bench compare before.json after.json --fail-above 1.05 --only output_throughput p99_ttft_ms
"""

import argparse
import fnmatch
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.plans import existing_file
from bench.record import describe_run, note, write_result

HIGH_UNIT = re.compile(r"_per_s$|_per_second$")
LOW_UNIT = re.compile(r"(^|_)(m?s|us)$|(^|_)(m?s|us)_per_\w+$|^seconds$")
"""Names with a unit: all numbers below them have it, but counts."""
HIGH = re.compile(r"_(throughput|goodput)$|^(completed|saved|mean_running|percent_of_\w+|fraction_\w+)$")
LOW = re.compile(
    r"^(\w+_)?latency$|^peak_\w*bytes$|^(duration|percentiles|elapsed_time|failed|num_compiles_\w+|num_preemptions"
    r"|cost_of_\w+)$"
)
"""Names of one number, or of the statistics of one."""
STATISTIC = re.compile(r"^(median|mean|min|max|p?[\d.]+)$")
SETTINGS = re.compile(r"^(bar_\w+|goodput_limits_ms|timeout_s|bytes_per_step)$")
"""What has a unit but was chosen."""
VOLATILE = frozenset((
    "bench", "date", "command", "label", "runs", "agreement", "ratio", "ratios", "num_runs", "is_saturated",
    "error_counts", "start_times", "ttfts", "itls", "latencies", "input_lens", "output_lens", "generated_texts",
    "errors",
))  # fmt: skip
"""Names of what may differ and is compared by no rule: a ratio follows of its parts, a list of its statistics."""
UNJUDGED = re.compile(
    r"^(client|ceilings|best|min|max|max_output_tokens_per_s|first_run_s|(peer|std|fraction)s?(_\w+)?|transformers.*)$"
)
"""Shown, but a reason to fail only if --only names it: of the machine, the client or a peer, or an extreme."""
MILD = re.compile(r"(^|\.)(versions\.\w+|commit|python|host\.system|server_version(\.\w+)?|total_(in|out)put_tokens"
                  r"|tokens_per_\w+|offered_request_rate|max_concurrent_requests)$")  # fmt: skip
"""Settings that may differ where a change is judged: the code, and what follows of it."""
SAME = 0.01


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of both results."""

    name: str
    before: float
    after: float
    is_high_good: bool
    is_judged: bool

    @property
    def worsening(self) -> float:
        """By what factor it is worse; below 1 it is better."""
        good, bad = (self.before, self.after) if self.is_high_good else (self.after, self.before)
        if good == bad:
            return 1.0
        return math.inf if not bad else good / bad

    @property
    def verdict(self) -> str:
        if abs(self.worsening - 1) <= SAME:
            return "same"
        factor = max(self.worsening, 1 / self.worsening if self.worsening else math.inf)
        word = "worse" if self.worsening > 1 else "better"
        return f"{factor:.2f}x {word}" if math.isfinite(factor) else f"{word}, from or to 0"


def flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a result with their paths: numbers, texts and lists of numbers; nothing of VOLATILE."""
    if path and path[-1] in VOLATILE:
        return
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from flatten(part, (*path, str(name)))
    elif isinstance(value, list) and not all(_is_number(part) for part in value):
        for index, part in enumerate(value):
            yield from flatten(part, (*path, str(index)))
    else:
        yield path, value


def direction(path: Sequence[str]) -> bool | None:
    """Whether a number of this name should be high; None if it is no metric."""
    if any(SETTINGS.search(name) for name in path):
        return None
    for name in reversed(path):
        if HIGH.search(name) or HIGH_UNIT.search(name):
            return True
        if LOW.search(name) or LOW_UNIT.search(name):
            return False
        if not STATISTIC.match(name):
            break
    if path and path[-1].startswith("num_"):
        return None
    for name in reversed(path):
        if HIGH_UNIT.search(name):
            return True
        if LOW_UNIT.search(name):
            return False
    return None


def metrics_of(leaves: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], float]:
    """The metrics among them; of repeats the median."""
    found = {}
    for path, value in leaves.items():
        if direction(path) is None:
            continue
        if isinstance(value, list) and value:
            found[path] = float(statistics.median(value))
        elif _is_number(value):
            found[path] = float(value)
    return found


def settings_of(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The rest, but what is neither chosen nor judged."""
    return {
        ".".join(path): value for path, value in leaves.items()
        if direction(path) is None and not any(UNJUDGED.match(name) for name in path)
    }  # fmt: skip


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Change], dict[str, tuple[Any, Any]]]:
    """Every metric of both, and every setting that differs. ValueError for results of two benches."""
    names = [bench_of(result) for result in (before, after)]
    if names[0] != names[1]:
        raise ValueError(f"the results are of two benches, {names[0]} and {names[1]}: nothing of them can be compared")
    sides = [dict(flatten(result)) for result in (before, after)]
    metrics = [metrics_of(side) for side in sides]
    changes = [
        Change(
            name=".".join(path), before=value, after=metrics[1][path], is_high_good=bool(direction(path)),
            is_judged=not any(UNJUDGED.match(name) for name in path),
        )
        for path, value in metrics[0].items() if path in metrics[1]
    ]  # fmt: skip
    if not changes:
        raise ValueError("the two results have no metric in common: are they results of a bench, made by --output?")
    settings = [settings_of(side) for side in sides]
    common = [name for name in settings[0] if name in settings[1]]
    return changes, {
        name: (settings[0][name], settings[1][name]) for name in common if settings[0][name] != settings[1][name]
    }


def bench_of(result: Mapping[str, Any]) -> str:
    """The name of the bench; a result without one that has the fields of vLLM's is of `serve`."""
    if "bench" in result:
        return str(result["bench"])
    return "serve" if {"request_throughput", "mean_ttft_ms"} <= set(result) else "unknown"


def read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON: give a file that a bench wrote by --output ({error})") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} is no JSON object: give a file that a bench wrote by --output")
    return result


def is_mild(name: str) -> bool:
    return MILD.search(name) is not None


def print_report(changes: Sequence[Change], differing: Mapping[str, tuple[Any, Any]]) -> None:
    """What differs, then the table for people."""
    serious = [name for name in differing if not is_mild(name)]
    if serious:
        print("THE RUNS DIFFER IN MORE THAN THE CODE: ratios may be due to that")
    for name in sorted(differing, key=is_mild):
        before, after = (_shown(value) for value in differing[name])
        print(f"  {name}: {before} -> {after}")
    width = max(len(change.name) for change in changes)
    print(f"{'':{width}}{'before':>14}{'after':>14}{'ratio':>8}")
    for change in changes:
        ratio = f"{change.after / change.before:8.3f}" if change.before else f"{'-':>8}"
        mark = "" if change.is_judged else " (not judged)"
        print(f"{change.name:{width}}{change.before:14.6g}{change.after:14.6g}{ratio}  {change.verdict}{mark}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jaxpaged bench compare", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("before", type=existing_file, metavar="A.json")
    parser.add_argument("after", type=existing_file, metavar="B.json")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="metrics, * for any characters, as in 'p99_*'")
    parser.add_argument(
        "--fail-above", type=float, metavar="RATIO",
        help="exit with 1 if a metric is worse by more than this factor, as 1.1; with 2 if the runs differ in more "
        "than code and versions",
    )  # fmt: skip
    parser.add_argument("--anyway", action="store_true", help="judge them even so")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    args = parser.parse_args(argv)
    if args.fail_above is not None and not 1 <= args.fail_above < math.inf:
        parser.error("--fail-above must be 1 or more: 1.1 lets a metric be 10 % worse")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 1 where a metric is too much worse, 2 where that cannot be judged."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    before, after = read(args.before), read(args.after)
    changes, differing = compare(before, after)
    if args.only:
        known = changes
        changes = [
            change for change in known if any(fnmatch.fnmatchcase(change.name, pattern) for pattern in args.only)
        ]
        if not changes:
            raise ValueError(f"--only {' '.join(args.only)} names none of {', '.join(one.name for one in known)}")
    print_report(changes, differing)
    judged = changes if args.only else [change for change in changes if change.is_judged]
    limit = args.fail_above
    worse = [change for change in judged if limit is not None and change.worsening > limit]
    serious = [name for name in differing if not is_mild(name)]
    code = 0
    if limit is not None and serious and not args.anyway:
        note(f"not judged: {', '.join(serious)} differ; make both runs alike, or say --anyway")
        code = 2
    elif worse:
        note(f"worse by more than {limit:g}: {', '.join(f'{one.name} ({one.verdict})' for one in worse)}")
        code = 1
    result = {
        **describe_run("bench.compare", arguments), "compared": bench_of(before),
        "commits": [before.get("commit"), after.get("commit")],
        "differing": {name: list(values) for name, values in differing.items()},
        "metrics": [
            asdict(change) | {"verdict": change.verdict, "worsening": _finite(change.worsening)} for change in changes
        ],
        "too_much_worse": [change.name for change in worse], "exit_code": code,
    }  # fmt: skip
    write_result(result, args.output)
    return code


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
