"""How the kernels multiply, and whether they run in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _probe(x):
    tl.store(x, 0)


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
"""Whether the kernels run in Triton's interpreter, which is chosen before they are imported."""


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: plain TF32 would change groups, and HIP knows no three-pass product.

    >>> dot_precision(torch.bfloat16)
    'ieee'
    """
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None and not INTERPRETED else "ieee"
