"""How long a step takes, by what it does: fitted to measured steps, or calculated from a device's peak rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxpaged.core.scheduler_output import SchedulerOutput
from jaxpaged.core.step_plan import num_logit_rows
from jaxpaged.runner.buckets import Buckets


@dataclass(frozen=True, slots=True)
class StepWork:
    """What the time of a step depends on; of its bucket: what it is padded to."""

    num_tokens: int
    num_bucket_tokens: int
    num_bucket_logits: int
    num_seqs: int
    num_keys: int
    """Tokens whose keys and values are read: the context lengths of all its sequences."""
    num_pairs: int
    """Of a query and a key that it sees."""
    num_copies: int
    """Blocks copied on write."""


FITTED = ("num_bucket_tokens", "num_bucket_logits", "num_seqs", "num_keys", "num_pairs", "num_copies")


def work_of(plan: SchedulerOutput, buckets: Buckets) -> StepWork:
    """Of a plan that schedules something."""
    num_tokens = num_logits = num_keys = num_pairs = 0
    for item in plan.scheduled:
        _, start, num_new, _ = item
        num_tokens += num_new
        num_logits += num_logit_rows(item)
        num_keys += start + num_new
        num_pairs += num_new * start + num_new * (num_new + 1) // 2
    num_seqs = len(plan.scheduled)
    bucket = buckets.pick(num_tokens, num_logits, num_seqs)
    return StepWork(
        num_tokens, bucket.num_tokens, bucket.num_logits, num_seqs, num_keys, num_pairs, len(plan.copies)
    )


class Costs(Protocol):
    """What a virtual clock asks."""

    def seconds(self, work: StepWork) -> float:
        """How long a step with this work takes."""


@dataclass(frozen=True)
class LinearCosts:
    """Seconds a step, and seconds for one more of each of FITTED; none is negative."""

    seconds_per_step: float
    seconds_per: dict[str, float]

    def seconds(self, work: StepWork) -> float:
        return self.seconds_per_step + sum(each * getattr(work, name) for name, each in self.seconds_per.items())


LARGE_ERROR = 0.5
"""A relative error beyond it counts less: such steps were disturbed by something else."""
NUM_FITS = 20


def fit(works: Sequence[StepWork], seconds: Sequence[float]) -> LinearCosts:
    """The costs whose errors, relative to what they say themselves, have the least squares (Huber's loss).

    Relative to the measured times would favour whatever is too short: with the host one step ahead, the end of a step
    may be seen late, and the next one then looks shorter than it is.
    """
    if not works:
        raise ValueError("no step was measured: give more requests")
    columns = np.array([[1, *(getattr(work, name) for name in FITTED)] for work in works], dtype=np.float64)
    times = np.asarray(seconds, dtype=np.float64)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-30)
    weights = 1 / np.full(len(times), np.median(times))
    for _ in range(NUM_FITS):
        found = _not_negative(columns / scale * weights[:, None], times * weights) / scale
        told = np.maximum(columns @ found, 1e-9)
        errors = np.maximum(np.abs(times / told - 1), 1e-12)
        weights = np.sqrt(np.minimum(1.0, LARGE_ERROR / errors)) / told
    return LinearCosts(float(found[0]), {name: float(found[index + 1]) for index, name in enumerate(FITTED)})


def _not_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares in which a coefficient that comes out negative is left out, the most negative first."""
    kept = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept], values, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            break
        del kept[int(found.argmin())]
    result = np.zeros(rows.shape[1])
    result[kept] = np.maximum(found, 0)
    return result


def relative_errors(costs: Costs, works: Sequence[StepWork], seconds: Sequence[float]) -> dict[str, float]:
    """Of single steps: the median of their absolute errors; and the error of the sum of all times."""
    told = np.array([costs.seconds(work) for work in works])
    times = np.asarray(seconds)
    errors = np.abs(told / times - 1)
    return {"median_step_error": float(np.median(errors)), "total_time_error": float(told.sum() / times.sum() - 1)}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates as its maker gives them."""

    name: str
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Sizes of a decoder with multi-head attention."""

    name: str
    num_params: float
    num_layers: int
    model_dim: int
    bytes_per_value: int = 2


@dataclass(frozen=True)
class RooflineCosts:
    """The least time that the device's peak rates allow: bytes read or operations done, whichever takes longer."""

    device: Device
    model: ServedModel

    def seconds(self, work: StepWork) -> float:
        model = self.model
        kv_bytes = 2 * model.num_layers * model.model_dim * model.bytes_per_value
        num_bytes = model.num_params * model.bytes_per_value + kv_bytes * work.num_keys
        flops = 2 * model.num_params * work.num_tokens + 4 * model.num_layers * model.model_dim * work.num_pairs
        return max(num_bytes / self.device.bytes_per_s, flops / self.device.flops_per_s)


PAPER_DEVICE = RooflineCosts(
    Device(name="A100 40GB", bytes_per_s=1.555e12, flops_per_s=312e12),
    ServedModel(name="OPT-13B", num_params=12.85e9, num_layers=40, model_dim=5120),
)
"""What the paper served OPT-13B on; rates and sizes as published."""


def as_json(costs: LinearCosts) -> dict[str, Any]:
    return {"seconds_per_step": costs.seconds_per_step, "seconds_per": costs.seconds_per}


def from_json(told: Mapping[str, Any]) -> LinearCosts:
    return LinearCosts(told["seconds_per_step"], dict(told["seconds_per"]))
