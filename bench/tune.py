"""Which sizes make the attention kernels fastest on this device?

Decodes are bound by memory bandwidth and prefills by arithmetic; what is searched is how near a kernel comes to them.
Sizes are searched one after the other, each with all others at the best found so far. The candidates of a size are
compiled, compared with the reference, and run in turn, round after round; one that does not compile or is wrong is out,
and said. One wins whose median time, as a geometric mean over the cases, is shorter than the best's so far by
MIN_GAIN; so where nothing is gained the default stays. The result of each shape class is written at once, to where the
kernels look for it:

    python -m bench.kernels tune --classes "group 4, block 16"

On a CPU (`--device`) a tiny class is searched with an interpreted kernel: that proves that it runs, and nothing is
written unless `--output` names a file.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from bench.device_kernels import (
    DTYPE,
    GROUP_1,
    GROUP_4,
    GROUP_8,
    TOLERANCE,
    DeviceCase,
    attention_case,
    interpreting,
    largest_error,
    our_caches,
    our_program,
    told,
)
from bench.record import describe_run, note, write_result
from pallas_kernels import misfits, pick
from pallas_kernels.cases import HEAD_SHAPES, MIXED, BatchCase, HeadShape
from pallas_kernels.paged_attention.api import find
from pallas_kernels.paged_attention.quantization import LARGEST
from pallas_kernels.paged_attention.tuning import (
    LAUNCHES,
    Entry,
    ShapeClass,
    Sizes,
    check_sizes,
    path_of,
    read_entries,
    write_entries,
)

MIN_GAIN = 0.02
"""Of the time, below which a difference counts as noise."""


@dataclass(frozen=True)
class Size:
    """One size to be searched: where it stands, what it may be, and whose time it decides."""

    kind: str
    """launch or tiles."""
    name: str
    values: tuple[int, ...]
    """Of decode_programs: quarters of the default, which follows from the device."""
    is_for_prefills: bool = False

    def candidates(self, implementation: str) -> list[int]:
        if self.name != "decode_programs":
            return list(self.values)
        module = importlib.import_module(f"pallas_kernels.paged_attention.{implementation}")
        return [value * module.default_launch().decode_programs // 4 for value in self.values]


QUARTERS = (1, 2, 4, 8, 16)
SEARCHED: dict[str, tuple[Size, ...]] = {
    "mosaic_gpu": (
        Size("launch", "decode_programs", QUARTERS),
        Size("launch", "programs_per_multiprocessor", (1, 2, 3, 4)),
        Size("launch", "decode_chunk_tokens", (64, 128)),
        Size("launch", "max_decode_stages", (2, 3, 4, 6)),
        Size("launch", "min_item_chunks", (1, 2, 4, 8, 16)),
        Size("tiles", "tile_size", (64, 128, 256), is_for_prefills=True),
    ),
    "triton_gpu": (
        Size("launch", "decode_programs", QUARTERS),
        Size("launch", "decode_turn_tokens", (16, 32, 64, 128)),
        Size("launch", "decode_warps", (2, 4, 8)),
        Size("launch", "min_item_chunks", (1, 2, 4, 8, 16)),
        Size("launch", "num_stages", (2, 3, 4)),
        Size("tiles", "tile_size", (16, 32, 64, 128), is_for_prefills=True),
    ),
    "mosaic_tpu": (
        Size("launch", "decode_chunk_bytes", tuple(2**exponent for exponent in (19, 20, 21, 22, 23))),
        Size("launch", "max_decode_chunk_tokens", (256, 512, 1024, 2048)),
        Size("tiles", "tile_size", (32, 64, 128), is_for_prefills=True),
        Size("tiles", "key_chunk_tokens", (128, 256, 512), is_for_prefills=True),
    ),
}


@dataclass(frozen=True)
class Plan:
    """A shape class, by its heads and block size, and the cases it is timed on."""

    heads: HeadShape
    block_size: int
    dtype: str = DTYPE
    """Of the cache."""
    decodes: tuple[tuple[int, int], ...] = ((1, 8192), (8, 4096), (32, 4096), (256, 1024))
    """(batch, context)."""
    prefills: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))

    @property
    def name(self) -> str:
        heads = self.heads
        group = heads.num_q_heads // heads.num_kv_heads
        name = f"{heads.num_kv_heads} heads of {heads.head_dim}, group {group}, block {self.block_size}"
        return name + told(self.dtype)

    def shape(self, implementation: str) -> ShapeClass:
        heads = self.heads
        return ShapeClass(
            implementation=implementation, dtype=self.dtype, head_dim=heads.head_dim, block_size=self.block_size,
            num_kv_heads=heads.num_kv_heads, group=heads.num_q_heads // heads.num_kv_heads,
        )  # fmt: skip

    def cases(self, is_for_prefills: bool) -> list[DeviceCase]:
        return [
            DeviceCase(
                name=f"{batch} x {context}", heads=self.heads, batch=batch, context=context,
                num_new=context if is_for_prefills else 1, block_size=self.block_size, dtype=self.dtype,
            )  # fmt: skip
            for batch, context in (self.prefills if is_for_prefills else self.decodes)
        ]

    def checked(self) -> tuple[BatchCase, ...]:
        """What a candidate must get right: decodes of some items each, and a mixed batch."""
        chunk = max(128, self.block_size)
        return tuple(
            BatchCase(
                name="", heads=self.heads, sequences=sequences, block_size=self.block_size, key_chunk_tokens=chunk,
                dtype=self.dtype,
            )  # fmt: skip
            for sequences in (((2100, 1), (700, 1), (1, 1), (65, 1)), MIXED)
        )


PLANS = (
    *(Plan(GROUP_4, block_size) for block_size in (16, 32, 64)),
    Plan(GROUP_8, 16),
    Plan(GROUP_1, 16),
    Plan(HEAD_SHAPES["gpt-oss-20b"], 16),
    Plan(HEAD_SHAPES["tinyllama"], 16),
    *(Plan(GROUP_4, 16, dtype) for dtype in LARGEST),
)
SMALL_PLANS = (Plan(HeadShape(4, 2, 64), 16, DTYPE, ((3, 40),), ((1, 20),)),)
SMALL_SEARCH = (Size("launch", "max_decode_chunk_tokens", (16, 1024)),)


def with_size(sizes: Sizes, size: Size, value: int) -> Sizes:
    return replace(sizes, **{size.kind: getattr(sizes, size.kind) | {size.name: value}})


def fault(plan: Plan, implementation: str, sizes: Sizes) -> str | None:
    """Why a candidate may not win: it is not allowed, does not compile, or is wrong."""
    try:
        check_sizes(plan.shape(implementation), sizes)
        error = max(largest_error(case, implementation, sizes) for case in plan.checked())
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
    for _ in range(repeats + 1):
        for found, (program, arguments) in zip(times, compiled, strict=True):
            start = time.perf_counter()
            caches, output = program(caches, *arguments)
            output.block_until_ready()
            found.append((time.perf_counter() - start) / num_layers * 1e3)
    return [found[1:] for found in times]


def search(
    plan: Plan, implementation: str, searched: Sequence[Size], *, num_layers: int, repeats: int
) -> tuple[Sizes, list[dict[str, Any]]]:
    """The best sizes that were found, those that are the defaults left out, and a row for each trial."""
    best, rows = Sizes(), []
    for size in searched:
        # the best so far goes first, so that all are compared with it in the same rounds
        candidates: list[tuple[int | None, Sizes]] = [(None, best)]
        for value in size.candidates(implementation):
            sizes = with_size(best, size, value)
            reason = fault(plan, implementation, sizes)
            if reason is None:
                candidates.append((value, sizes))
            else:
                rows.append({"class": plan.name, "size": size.name, "value": value, "because": reason})
                print(f"{plan.name:<36}{size.name:<26}{value:>9}  out: {reason}", flush=True)
        costs = [0.0] * len(candidates)
        by_case: list[dict[str, float]] = [{} for _ in candidates]
        cases = plan.cases(size.is_for_prefills)
        for case in cases:
            times = times_in_turn(
                implementation, case, [sizes for _, sizes in candidates], num_layers=num_layers, repeats=repeats
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
            rows.append({
                "class": plan.name, "size": size.name, "value": value, "ratio": ratio, "ms": by_case[index],
                "is_chosen": index == winner,
            })  # fmt: skip
            shown = "as before" if value is None else str(value)
            cells = "".join(f"{name:>12} {ms:8.3f} ms" for name, ms in by_case[index].items())
            chosen = " <-" if index == winner else ""
            print(f"{plan.name:<36}{size.name:<26}{shown:>9}{ratio:8.3f}{cells}{chosen}", flush=True)
        best = candidates[winner][1]
    return best, rows


def main(arguments: Sequence[str]) -> int:
    """`python -m bench.kernels tune ...`; the exit status."""
    is_small = jax.default_backend() == "cpu"
    plans, default = SMALL_PLANS if is_small else PLANS, "mosaic_tpu"
    if not is_small:
        default = pick(attention_case(GROUP_4, 16)).name
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels tune", description=about)
    parser.add_argument("--implementations", nargs="+", choices=list(LAUNCHES), default=[default])
    parser.add_argument("--classes", nargs="+", metavar="PART", default=[""], help="those that have one in their name")
    parser.add_argument("--num-layers", type=int, default=1 if is_small else 8)
    parser.add_argument("--repeats", type=int, default=1 if is_small else 10)
    parser.add_argument("--output", type=Path, help="default on an accelerator: where kernels look for it")
    parser.add_argument("--device", action="store_true", help="also without an accelerator: tiny and interpreted")
    args = parser.parse_args(arguments)
    chosen = [plan for plan in plans if any(part in plan.name for part in args.classes)]
    if not chosen or args.num_layers < 1 or args.repeats < 1:
        parser.error(f"--classes must fit one of {[plan.name for plan in plans]}, counts must be 1 or more")
    if is_small and not args.device:
        parser.error("there is nothing to be tuned on a CPU: --device has a tiny search run there, interpreted")
    kind = jax.devices()[0].device_kind
    path = path_of(kind) if args.output is None and not is_small else args.output
    if path is not None:
        try:
            read_entries(path)
        except ValueError as error:
            parser.error(f"{path} would be added to, but {error}: mend or delete it")
    if is_small:
        note("on a CPU, kernels are interpreted: these times say nothing about hardware")
    record = describe_run("bench.kernels", ["tune", *arguments])
    rows, entries, left_out = [], [], []
    for name in args.implementations:
        for plan in chosen:
            with interpreting(name):
                reasons = misfits(find(name), attention_case(plan.heads, plan.block_size, plan.dtype))
                if reasons:
                    left_out.append({"class": plan.name, "implementation": name, "because": "; ".join(reasons)})
                    print(f"{plan.name:<36}{name}: not tuned, {'; '.join(reasons)}", flush=True)
                    continue
                searched = SMALL_SEARCH if is_small else SEARCHED[name]
                sizes, found = search(plan, name, searched, num_layers=args.num_layers, repeats=args.repeats)
            rows += [{"implementation": name, **row} for row in found]
            measured = {key: record[key] for key in ("date", "command", "commit")} | {"jax": jax.__version__}
            entries.append(Entry(plan.shape(name), sizes, measured))
            if path is not None:
                write_entries(path, kind, entries[-1:])
    where = "nothing was written" if path is None else f"written to {path}"
    print(f"{len(entries)} classes tuned, {where}")
    result = {**record, "bench": "tune", "device": kind, "jax": jax.__version__, "is_interpreted": is_small}
    result |= {"entries": [entry.as_json() for entry in entries], "rows": rows, "not_tuned": left_out}
    write_result(result, None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
