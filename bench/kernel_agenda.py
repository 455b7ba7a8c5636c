"""What of the kernels' bench is done first, within a number of minutes, so that a run that is cut short has the most.

First what the picked kernel computes is compared with float64. Then cases with a goal are timed, by it and by
contiguous attention; then all its other cases, the other peers, and last the other implementations: first whether they
are right, then their times. Each result is written as it comes, with the name of what is under way: a kernel that
never ends, or after which the device answers no more, ends the run, and when another goes on with the file, what the
first was killed in comes last.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench import deadline
from bench.device_cases import CONTIGUOUS_GOAL, DTYPE, DeviceCase, ceiling_goal, check_of, has_goal
from bench.device_kernels import (
    TOLERANCE,
    attention_case,
    does_device_answer,
    interpreting,
    largest_error,
    times_ms,
)
from bench.device_layers import CONTIGUOUS, PEERS, ours
from bench.record import note, save_result
from pallas_kernels import misfits
from pallas_kernels.cases import BatchCase
from pallas_kernels.paged_attention.api import find


@dataclass(frozen=True)
class Job:
    """One thing to do: compare an implementation with float64 on a batch, or time it, or a peer, on a case."""

    implementation: str
    case: BatchCase | DeviceCase

    @property
    def kind(self) -> str:
        return "check" if isinstance(self.case, BatchCase) else "time"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.implementation} on {self.case.name}"

    @property
    def labels(self) -> dict[str, str]:
        """What a row in the result says of it."""
        return {"kind": self.kind, "implementation": self.implementation, "case": self.case.name}

    def reasons_against(self) -> list[str]:
        """Why the implementation does not serve the case; peers say so themselves."""
        if self.implementation in PEERS:
            return []
        with interpreting(self.implementation):
            shape = attention_case(self.case.heads, self.case.block_size, self.case.dtype)
            return misfits(find(self.implementation), shape)


def time_case(
    case: DeviceCase, implementation: str, *, num_layers: int, repeats: int
) -> tuple[list[float], float]:
    """Milliseconds a layer in each repeat, and the seconds that compiling took; raises what the implementation does."""
    make = PEERS.get(implementation) or partial(ours, implementation)
    # the code of others counts on numpy's promotion
    promotion = "standard" if implementation in PEERS else "strict"
    with jax.numpy_dtype_promotion(promotion), interpreting(implementation):
        return times_ms(make(case, num_layers), num_layers, repeats)


def agenda(
    names: Sequence[str], cases: Sequence[DeviceCase], checks: Sequence[BatchCase], picked: str
) -> list[Job]:
    """All jobs, the most important first."""
    jobs = [Job(name, check) for name in names if name not in PEERS for check in checks]
    jobs += [Job(name, case) for case in cases for name in names]

    def rank(job: Job) -> int:
        if isinstance(job.case, BatchCase):
            return 0 if job.implementation == picked else 4
        if has_goal(job.case) and job.implementation in (picked, *CONTIGUOUS):
            return 1
        if job.implementation in (picked, *PEERS):
            return 2 if job.implementation == picked else 3
        return 5 if has_goal(job.case) else 6

    return sorted(jobs, key=rank)


def empty_result() -> dict[str, Any]:
    """Of no job yet. `under_way` is the name of the job that has begun and not ended; the lists are rows of jobs."""
    return {"runs": [], "checks": [], "rows": [], "not_timed": [], "failed": [], "under_way": None}


@dataclass
class Run:
    """One run through an agenda, into a result that may hold those of earlier runs."""

    result: dict[str, Any]
    output: Path | None
    num_layers: int
    repeats: int
    bandwidth: float
    matmul_rate: float
    is_device_lost: bool = False
    """Whether the device answers no more: all that this process would yet find is that."""

    def do_all(self, jobs: Sequence[Job], until: float) -> None:
        """All jobs that the result has not, but none that would begin after the time `until` of `perf_counter`."""
        killed_in, self.result["under_way"], left_out = self.result["under_way"], None, []
        done = self._done()
        todo = [job for job in jobs if job.name not in done and (job.kind == "time" or not job.reasons_against())]
        print(f"{'case':<40}{'implementation':<18}{'ms':>10}{'min':>10}{'ceiling':>10}{'of it':>7}{'compile s':>11}")
        for job in sorted(todo, key=lambda job: job.name == killed_in):
            if self.is_device_lost or time.perf_counter() >= until or not self._may_be_timed(job):
                left_out.append(job.name)
                continue
            self.result["under_way"] = job.name
            save_result(self.result, self.output)
            with deadline.given_up_after(deadline.JOB_LIMIT_S, partial(self._give_up, job)):
                self._check(job) if job.kind == "check" else self._time(job)
            self.result["under_way"] = None
        self.result["left_out"] = left_out
        save_result(self.result, self.output)

    def _done(self) -> set[str]:
        rows = (row for part in ("checks", "rows", "not_timed", "failed") for row in self.result[part])
        return {f"{row['kind']} {row['implementation']} on {row['case']}" for row in rows}

    def _may_be_timed(self, job: Job) -> bool:
        """Whether nothing is unknown of whether it is right for the heads, blocks and dtype of a case to be timed."""
        if job.kind == "check" or job.implementation in PEERS or job.reasons_against():
            return True
        return Job(job.implementation, check_of(job.case)).name in self._done()

    def _give_up(self, job: Job) -> None:
        self._fail(job, f"did not end within {deadline.JOB_LIMIT_S:.0f} s, which ended the run: --resume goes on")
        self.result["under_way"] = None
        save_result(self.result, self.output)

    def _fail(self, job: Job, reason: str) -> None:
        self.result["failed"].append({**job.labels, "because": reason})
        print(f"{job.name}: FAILED, {reason}", flush=True)

    def _told(self, failure: Exception) -> str:
        reason = (str(failure) or type(failure).__name__).splitlines()[0][:200]
        self.is_device_lost = not does_device_answer()
        return reason + "; the device answers no more, which ended the run: --resume" * self.is_device_lost

    def _check(self, job: Job) -> None:
        note(job.name)
        try:
            error = largest_error(job.case, job.implementation)
        except Exception as failure:  # whatever a compiler raises
            self._fail(job, self._told(failure))
            return
        if error > TOLERANCE:
            self._fail(job, f"wrong by {error:.3g}")
        else:
            self.result["checks"].append({**job.labels, "error": error})

    def _time(self, job: Job) -> None:
        note(job.name)
        is_peer = job.implementation in PEERS
        reason = "; ".join(job.reasons_against()) or self._why_wrong(job)
        if is_peer and job.case.dtype != DTYPE:
            reason = f"is given keys and values as {DTYPE} alone"
        if reason:
            self._not_timed(job, reason)
            return
        try:
            timed = time_case(job.case, job.implementation, num_layers=self.num_layers, repeats=self.repeats)
        except Exception as failure:  # whatever a peer raises is why it has no time
            reason = self._told(failure)
            self._not_timed(job, reason) if is_peer else self._fail(job, reason)
            return
        self._timed(job, *timed)

    def _why_wrong(self, job: Job) -> str:
        """Times of a kernel that is wrong for such heads, blocks and dtype mean nothing."""
        check = {**job.labels, "kind": "check", "case": check_of(job.case).name}
        failed = [row["because"] for row in self.result["failed"] if row.items() >= check.items()]
        return f"on its check it {failed[0]}" if failed else ""

    def _not_timed(self, job: Job, reason: str) -> None:
        self.result["not_timed"].append({**job.labels, "because": reason})
        print(f"{job.case.name:<40}{job.implementation:<18}not timed: {reason}", flush=True)

    def _timed(self, job: Job, times: list[float], compile_s: float) -> None:
        median, case = statistics.median(times), job.case
        ceiling_ms = max(case.num_bytes / self.bandwidth, case.flops / self.matmul_rate) * 1e3
        print(
            f"{case.name:<40}{job.implementation:<18}{median:10.3f}{min(times):10.3f}{ceiling_ms:10.3f}"
            f"{ceiling_ms / median:7.0%}{compile_s:11.1f}", flush=True,
        )  # fmt: skip
        self.result["rows"].append({
            **job.labels, "dtype": case.dtype, "ms": median, "ms_min": min(times), "num_repeats": len(times),
            "ceiling_ms": ceiling_ms, "fraction_of_ceiling": ceiling_ms / median, "compile_s": compile_s,
        })  # fmt: skip


def verdicts(result: dict[str, Any], jobs: Sequence[Job], picked: str) -> list[dict[str, Any]]:
    """What became of each goal of the picked kernel: reached, missed, or not measured, with what was found."""
    rows = {(row["implementation"], row["case"]): row for row in result["rows"]}
    goals = []

    def judge(goal: str, most: float, found: float | None) -> None:
        verdict = "not measured" if found is None else "reached" if found <= most else "missed"
        goals.append({"goal": goal, "found": found, "verdict": verdict})

    checks = [job for job in jobs if job.kind == "check" and job.implementation == picked]
    errors = {row["case"]: row["error"] for row in result["checks"] if row["implementation"] == picked}
    has_failed = any(row["kind"] == "check" and row["implementation"] == picked for row in result["failed"])
    is_whole = all(job.case.name in errors for job in checks if not job.reasons_against())
    error = float("inf") if has_failed else max(errors.values()) if errors and is_whole else None
    judge(f"largest error at most {TOLERANCE:g} in all cases", TOLERANCE, error)
    for job in jobs:
        if job.implementation != picked or job.kind == "check" or not has_goal(job.case):
            continue
        row, name = rows.get((picked, job.case.name)), job.case.name
        contiguous = [rows[peer, name]["ms"] for peer in CONTIGUOUS if (peer, name) in rows]
        least = ceiling_goal(job.case)
        # times the ceiling: at most the inverse of the part of it that is to be reached
        judge(f"{name}: at most {1 / least:.2f}x its ceiling", 1 / least, row and row["ms"] / row["ceiling_ms"])
        ratio = row["ms"] / min(contiguous) if row and contiguous else None
        judge(f"{name}: at most {CONTIGUOUS_GOAL}x contiguous attention", CONTIGUOUS_GOAL, ratio)
    return goals
