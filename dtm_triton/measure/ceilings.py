"""What the device at hand can do: the bandwidth of a large copy and the rates of large matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dtm_triton.measure.timing import measure

COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bandwidth in GB/s, bytes read plus bytes written, and matrix rates in TFLOP/s by dtype."""

    copy_gb_s: float
    matrix_tflop_s: dict[str, float]

    def floor_ms(self, moved: int, operations: int, dtype: str) -> float:
        """No version can be much faster than its least bytes and its least operations take, whichever is longer.

        >>> Ceilings(copy_gb_s=4300.0, matrix_tflop_s={"bfloat16": 790.0}).floor_ms(43_000_000, 0, "bfloat16")
        0.01
        """
        return max(moved / self.copy_gb_s / 1e6, operations / self.matrix_tflop_s[dtype] / 1e9)


def measure_ceilings(device: torch.device, seconds: float, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    """Measure them, on random numbers.

    >>> ceilings = measure_ceilings(torch.device("cpu"), 0.01, (torch.float32,))
    >>> ceilings.copy_gb_s > 0, ceilings.matrix_tflop_s["float32"] > 0
    (True, True)
    """
    size = COPIED_BYTES[device.type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, seconds)
    rates = {dtype_name(dtype): _matrix_rate(device, dtype, seconds) for dtype in dtypes}
    return Ceilings(copy_gb_s=2 * size / copy.median_ms / 1e6, matrix_tflop_s=rates)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its module.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """TFLOP/s of a square product; in float32 on a GPU, of the faster of a plain product and three TF32 passes."""
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rate = _product_rate(lambda: a @ b, device, seconds, size)
    if dtype != torch.float32 or device.type == "cpu":
        return rate
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return max(rate, _product_rate(lambda: a @ b, device, seconds, size) / 3)
    finally:
        torch.set_float32_matmul_precision(before)


def _product_rate(product: Callable[[], object], device: torch.device, seconds: float, size: int) -> float:
    return 2 * size**3 / measure(product, device, seconds).median_ms / 1e9
