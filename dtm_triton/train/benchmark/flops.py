"""Floating-point operations of matrix products and convolutions, counted while a function runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], object]) -> int:
    """Operations of a call, a multiplication and an addition as two; works on "meta" tensors too.

    Attention runs as two plain products: fused kernels differ in what they compute twice, and a model's operations
    should not depend on the machine.

    >>> import torch
    >>> a, b = torch.ones(2, 3, device="meta"), torch.ones(3, 5, device="meta")
    >>> count_flops(lambda: a @ b) == 2 * 2 * 3 * 5
    True
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
