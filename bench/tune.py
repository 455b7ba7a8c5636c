"""Which sizes make the attention kernels fastest on this device?

Decodes are bound by memory bandwidth and prefills by arithmetic; what is searched is how near a kernel comes to them.
Sizes are searched one after the other, each with all others at the best found so far. The candidates of a size are
compiled, compared with attention in float64, and run in turn, round after round; one that does not compile or is wrong
is out, and said. One wins whose median time, as a geometric mean over the cases, is shorter than the best's so far by
MIN_GAIN; so where nothing is gained the default stays. The sizes of a shape class are written whenever one of them has
been searched, to where the kernels look for them:

    python -m bench.kernels tune --classes "group 4, block 16"

The most usual classes come first. Nothing is begun after `--minutes`; what was not searched then, and what a run that
was killed had not reached, the same command with `--resume` goes on with. A candidate that never ends ends the run, and
`--resume` leaves it out.

On a CPU (`--device`) a tiny class is searched with an interpreted kernel: that proves that it runs, and nothing is
written unless `--output` names a file.
"""

import argparse
import importlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from bench import deadline
from bench.device_cases import GROUP_4, DeviceCase
from bench.device_kernels import (
    TOLERANCE,
    attention_case,
    calls_of_a_repeat,
    does_device_answer,
    interpreting,
    largest_error,
)
from bench.device_layers import our_caches, our_program
from bench.record import describe_run, note, sources_digest, write_result
from bench.tune_classes import PLANS, SEARCHED, SMALL_PLANS, SMALL_SEARCH, Plan, Size, with_size
from pallas_kernels import misfits, pick
from pallas_kernels.paged_attention.api import find
from pallas_kernels.paged_attention.metadata import KEY_CHUNK_TOKENS, TILE_SIZE
from pallas_kernels.paged_attention.tuning import (
    LAUNCHES,
    Entry,
    Sizes,
    check_sizes,
    path_of,
    read_entries,
    write_entries,
)

RACE_LIMITS = 4
"""A race of all candidates on all cases may take so many times as long as one thing."""
MIN_GAIN = 0.02
"""Of the time, below which a difference counts as noise."""


def is_as_before(implementation: str, before: Sizes, sizes: Sizes) -> bool:
    """Whether a candidate makes the same programs: its size is the default, or the one that was found."""
    default = importlib.import_module(f"pallas_kernels.paged_attention.{implementation}").default_launch()
    tiles = {"tile_size": TILE_SIZE, "key_chunk_tokens": KEY_CHUNK_TOKENS}
    launches = [replace(default, **one.launch) for one in (before, sizes)]
    return launches[0] == launches[1] and tiles | dict(before.tiles) == tiles | dict(sizes.tiles)


def fault(plan: Plan, implementation: str, sizes: Sizes) -> str | None:
    """Why a candidate may not win: it is not allowed, does not compile, or is wrong."""
    try:
        check_sizes(plan.shape(implementation), sizes)
        error = largest_error(plan.checked(), implementation, sizes)
    except Exception as failure:  # whatever a compiler raises
        return (str(failure) or type(failure).__name__).splitlines()[0][:160]
    return None if error <= TOLERANCE else f"wrong by {error:.3g}"


def times_in_turn(
    implementation: str, case: DeviceCase, candidates: Sequence[Sizes], *, num_layers: int, repeats: int
) -> list[list[float]]:
    """Milliseconds a layer of each candidate in each round; all of them work on the same caches."""
    caches = our_caches(implementation, case, num_layers)
    compiled = []
    for sizes in candidates:
        run, arguments = our_program(implementation, case, num_layers, sizes)
        compiled.append((run.lower(caches, *arguments).compile(), arguments))
    times: list[list[float]] = [[] for _ in candidates]
    num_calls = 1
    for number in range(repeats + 2):
        for found, (program, arguments) in zip(times, compiled, strict=True):
            start = time.perf_counter()
            for _ in range(num_calls):
                caches, output = program(caches, *arguments)
            output.block_until_ready()
            found.append((time.perf_counter() - start) / num_calls / num_layers * 1e3)
        if number == 1:  # the first loads the programs, the second tells how many calls a round is to have
            num_calls = calls_of_a_repeat(min(found[1] for found in times) * num_layers / 1e3)
    return [found[2:] for found in times]


@dataclass
class Search:
    """The search of the sizes of one shape class."""

    plan: Plan
    implementation: str
    saved: Callable[[Entry], None]
    """Keeps what was found so far."""
    measured: Mapping[str, Any]
    """By whom, when and with what kernels, for its entry."""
    best: Sizes = field(default_factory=Sizes)
    """Found so far, the defaults left out."""
    searched: list[str] = field(default_factory=list)
    """The sizes that were."""
    endless: list[str] = field(default_factory=list)
    """Candidates that did not end, as they are named here."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each trial."""

    @property
    def entry(self) -> Entry:
        """What is known so far, for the file of tuned sizes."""
        state = {"searched": list(self.searched)} | ({"endless": list(self.endless)} if self.endless else {})
        return Entry(self.plan.shape(self.implementation), self.best, {**self.measured, **state})

    def search(self, size: Size, *, num_layers: int, repeats: int) -> None:
        """Find the best value of a size, with the others at the best so far."""
        # the best so far goes first, so that all are compared with it in the same rounds
        candidates: list[tuple[int | None, Sizes]] = [(None, self.best)]
        for value in size.candidates(self.implementation):
            sizes = with_size(self.best, size, value)
            if is_as_before(self.implementation, self.best, sizes):
                continue
            reason = self._fault(sizes)
            if reason is None:
                candidates.append((value, sizes))
            else:
                self.rows.append({"class": self.plan.name, "size": size.name, "value": value, "because": reason})
                print(f"{self.plan.name:<36}{size.name:<26}{value:>9}  out: {reason}", flush=True)
        if len(candidates) > 1:
            self._race_or_leave(size, candidates, num_layers, repeats)
        self.searched.append(size.name)
        self.saved(self.entry)

    def _race_or_leave(
        self, size: Size, candidates: Sequence[tuple[int | None, Sizes]], num_layers: int, repeats: int
    ) -> None:
        """Race; where some candidate fails at these sizes, or never ends, the size stays as it was and the run ends."""

        def last_words() -> None:
            self.searched.append(size.name)
            self.saved(self.entry)
            print(f"{self.plan.name}: timing {size.name} did not end well, and ends the run: it stays", flush=True)

        with deadline.given_up_after(RACE_LIMITS * deadline.JOB_LIMIT_S, last_words):
            try:
                self._race(size, candidates, num_layers, repeats)
            except Exception:
                last_words()
                raise

    def _fault(self, sizes: Sizes) -> str | None:
        named = f"{dict(sizes.launch)} {dict(sizes.tiles)}"
        if named in self.endless:
            return "did not end well in the run before"

        def last_words() -> None:
            self.endless.append(named)
            self.saved(self.entry)
            print(f"{self.plan.name}: {named} did not end well, and ends the run: --resume leaves it out", flush=True)

        with deadline.given_up_after(deadline.JOB_LIMIT_S, last_words):
            reason = fault(self.plan, self.implementation, sizes)
        if reason is not None and not does_device_answer():
            last_words()
            raise SystemExit(f"{reason}: after it, the device answers no more")
        return reason

    def _race(self, size: Size, candidates: Sequence[tuple[int | None, Sizes]], num_layers: int, repeats: int) -> None:
        """Time the candidates; the best of them is the best so far."""
        costs = [0.0] * len(candidates)
        by_case: list[dict[str, float]] = [{} for _ in candidates]
        cases = self.plan.cases(size.is_for_prefills)
        for case in cases:
            times = times_in_turn(
                self.implementation, case, [sizes for _, sizes in candidates], num_layers=num_layers, repeats=repeats
            )
            medians = [statistics.median(found) for found in times]
            for index, median in enumerate(medians):
                by_case[index][case.name] = median
                costs[index] += math.log(median / medians[0]) / len(cases)
        ratios = [math.exp(cost) for cost in costs]
        winner = min(range(len(candidates)), key=lambda index: ratios[index])
        if ratios[winner] > 1 - MIN_GAIN:
            winner = 0
        for index, ((value, _), ratio) in enumerate(zip(candidates, ratios, strict=True)):
            self.rows.append({
                "class": self.plan.name, "size": size.name, "value": value, "ratio": ratio, "ms": by_case[index],
                "is_chosen": index == winner,
            })  # fmt: skip
            shown = "as before" if value is None else str(value)
            cells = "".join(f"{name:>12} {ms:8.3f} ms" for name, ms in by_case[index].items())
            chosen = " <-" if index == winner else ""
            print(f"{self.plan.name:<36}{size.name:<26}{shown:>9}{ratio:8.3f}{cells}{chosen}", flush=True)
        self.best = candidates[winner][1]


def gone_on_with(search: Search, entries: Sequence[Entry]) -> Search:
    """The search, or where an entry has its state, by the same kernels and jax, what that had come to."""
    for entry in entries:
        if entry.shape == search.plan.shape(search.implementation) and all(
            entry.measured.get(name) == search.measured[name] for name in ("jax", "kernels")
        ):
            searched, endless = (list(entry.measured.get(name, ())) for name in ("searched", "endless"))
            return replace(search, best=entry.sizes, searched=searched, endless=endless)
    return search


def parsed(arguments: Sequence[str], plans: Sequence[Plan], is_small: bool) -> argparse.Namespace:
    """The arguments, with the chosen plans as `plans`."""
    default = "mosaic_tpu" if is_small else pick(attention_case(GROUP_4, 16)).name
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels tune", description=about)
    parser.add_argument("--implementations", nargs="+", choices=list(LAUNCHES), default=[default])
    parser.add_argument("--classes", nargs="+", metavar="PART", default=[""], help="those that have one in their name")
    parser.add_argument("--num-layers", type=int, default=1 if is_small else 8)
    parser.add_argument("--repeats", type=int, default=1 if is_small else 10)
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after them (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with what the file lacks")
    parser.add_argument("--output", type=Path, help="default on an accelerator: where kernels look for it")
    parser.add_argument("--device", action="store_true", help="also without an accelerator: tiny and interpreted")
    args = parser.parse_args(arguments)
    args.plans = [plan for plan in plans if any(part in plan.name for part in args.classes)]
    if not args.plans or args.num_layers < 1 or args.repeats < 1 or not args.minutes > 0:
        names = [plan.name for plan in plans]
        parser.error(f"--classes must fit one of {names}, counts must be 1 or more, --minutes above 0")
    if is_small and not args.device:
        parser.error("there is nothing to be tuned on a CPU: --device has a tiny search run there, interpreted")
    if args.output is None and not is_small:
        args.output = path_of(jax.devices()[0].device_kind)
    args.known = ()
    if args.output is not None:
        try:
            args.known = read_entries(args.output)
        except ValueError as error:
            parser.error(f"{args.output} would be added to, but {error}: mend or delete it")
    return args


def main(arguments: Sequence[str]) -> int:
    """`python -m bench.kernels tune ...`; the exit status."""
    started = time.perf_counter()
    is_small = jax.default_backend() == "cpu"
    args = parsed(arguments, SMALL_PLANS if is_small else PLANS, is_small)
    kind = jax.devices()[0].device_kind
    if is_small:
        note("on a CPU, kernels are interpreted: these times say nothing about hardware")
    record = describe_run("bench.kernels", ["tune", *arguments])
    measured = {key: record[key] for key in ("date", "command", "commit")}
    measured |= {"jax": jax.__version__, "kernels": sources_digest(("pallas_kernels/**/*.py",))}

    def save(entry: Entry) -> None:
        if args.output is not None:
            write_entries(args.output, kind, [entry])

    rows, entries, left_out, unfinished = [], [], [], []
    for name, plan in itertools.product(args.implementations, args.plans):
        with interpreting(name):
            reasons = misfits(find(name), attention_case(plan.heads, plan.block_size, plan.dtype))
            if reasons:
                left_out.append({"class": plan.name, "implementation": name, "because": "; ".join(reasons)})
                print(f"{plan.name:<36}{name}: not tuned, {'; '.join(reasons)}", flush=True)
                continue
            search = gone_on_with(Search(plan, name, save, measured), args.known if args.resume else ())
            todo = [size for size in (SMALL_SEARCH if is_small else SEARCHED[name]) if size.name not in search.searched]
            while todo and time.perf_counter() < started + 60 * args.minutes:
                search.search(todo.pop(0), num_layers=args.num_layers, repeats=args.repeats)
        if todo:
            unfinished.append({"class": plan.name, "implementation": name, "sizes": [size.name for size in todo]})
        rows += [{"implementation": name, **row} for row in search.rows]
        entries += [search.entry] if search.searched else []
    where = "nothing was written" if args.output is None else f"written to {args.output}"
    rest = f"; {len(unfinished)} are not or not wholly searched: --resume goes on" if unfinished else ""
    print(f"{len(entries)} classes tuned, {where}{rest}")
    result = {**record, "bench": "tune", "device": kind, "jax": jax.__version__, "is_interpreted": is_small}
    result |= {"entries": [entry.as_json() for entry in entries], "rows": rows, "not_tuned": left_out}
    write_result(result | {"unfinished": unfinished}, None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
