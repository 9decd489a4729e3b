"""What the tests that need a GPU share: the mark that skips them, and the cases they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtm_triton.measure.cases import Case, gpu_cases

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")

CASES = [case for case in gpu_cases() if case.dtype == torch.bfloat16]
"""Every op in one dtype, at the shapes that are measured."""

SMALL = [replace(case, batch=min(case.batch, 4)) for case in CASES if case.batch != 8 or case.tokens > 1024]
"""The same on a few images."""

LOSSES = [case for case in SMALL if case.op in ("dtm_loss", "morph_loss")]


def ids(cases: list[Case]) -> list[str]:
    """Names for pytest."""
    return [case.name for case in cases]
