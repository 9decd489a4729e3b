"""Kernel tests run in guarded memory: what a launcher allocates is poisoned, and lies between guard bands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

BAND = 512
"""Entries of a guard band on each side."""


class Guard:
    """Takes the place of torch.empty: fills with `poison` what it gives, and finds writes beside it."""

    def __init__(self) -> None:
        self.poison = -7
        self.blocks: list[tuple[Tensor, Tensor, int]] = []

    def empty(self, shape: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        count = torch.Size(shape).numel()
        fill = float("nan") if dtype.is_floating_point else self.poison
        block = torch.full((count + 2 * BAND,), fill, dtype=dtype, device=device)
        self.blocks.append((block, block[:1].clone(), count))
        return block[BAND : BAND + count].view(shape)

    def check(self) -> None:
        """Raise if a band changed."""
        for block, fill, count in self.blocks:
            for band in (block[:BAND], block[BAND + count :]):
                clean = band.isnan() if block.dtype.is_floating_point else band == fill
                assert clean.all(), f"{(~clean).sum()} entries written outside a tensor of {count}"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    guard = Guard()
    monkeypatch.setattr(torch, "empty", guard.empty)
    yield guard
    guard.check()
    assert guard.blocks, "nothing was allocated through the guard"
