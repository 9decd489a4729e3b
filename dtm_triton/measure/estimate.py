"""Floors of cases on a GPU that is not at hand: assumed ceilings, nothing measured."""

from __future__ import annotations

from dtm_triton.measure.cases import Case, bytes_moved, flops
from dtm_triton.measure.ceilings import Ceilings, dtype_name

ASSUMED_DEVICE = "NVIDIA H200"

ASSUMED = Ceilings(copy_gb_s=4300.0, matrix_tflop_s={"bfloat16": 790.0, "float16": 790.0, "float32": 130.0})
"""A device-to-device copy and 8192 x 8192 x 8192 products near what that GPU's datasheet leads one to expect; float32
in three TF32 passes, each at half of bfloat16's rate. Assumptions: the benchmark measures its own."""


def estimate(case: Case) -> dict[str, float]:
    """Bytes and operations of a case, what each takes at the assumed ceilings, and the floor: the longer one, in us.

    >>> case = Case(op="match", batch=128, tokens=196, channels=512, schedules=((14,) * 14,))
    >>> {name: round(value, 1) for name, value in estimate(case).items()}
    {'megabytes': 25.8, 'gigaflops': 2.5, 'bytes_us': 6.0, 'flops_us': 3.2, 'floor_us': 6.0}
    """
    moved, operations, dtype = bytes_moved(case), flops(case), dtype_name(case.dtype)
    return {
        "megabytes": moved / 1e6,
        "gigaflops": operations / 1e9,
        "bytes_us": 1e3 * ASSUMED.floor_ms(moved, 0, dtype),
        "flops_us": 1e3 * ASSUMED.floor_ms(0, operations, dtype),
        "floor_us": 1e3 * ASSUMED.floor_ms(moved, operations, dtype),
    }
