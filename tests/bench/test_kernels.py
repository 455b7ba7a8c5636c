"""Who is timed on which device."""

import pytest

from bench.kernels import reasons_to_skip
from pallas_kernels import lowering_for
from pallas_kernels.cases import BENCH_CASES, with_options


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [("cuda", "NVIDIA H200", "mosaic_gpu"), ("tpu", "TPU v6 lite", "mosaic_tpu")],
)
def test_a_device_times_the_kernel_that_was_made_for_it(platform: str, kind: str, name: str) -> None:
    case = with_options(BENCH_CASES[0], dtype="bfloat16")
    assert "not on cpu" in reasons_to_skip(case)[name]
    with lowering_for(platform, kind):
        skipped = reasons_to_skip(case)
    assert name not in skipped
    assert "not on" in skipped["native_cpu"]
