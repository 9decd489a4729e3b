"""The targets that are compared: an objective morphs, compares token by token, or uses the released operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dtm_triton.measure.released import ReleasedLoss

DTM, TOKEN_WISE, RELEASED = "dtm", "token-wise", "released"


class InLine:
    """Stands for `Beside` where parts are timed: matching runs between teacher and student, beside nothing."""

    def start(self, work: Callable[[], Sequence[Tensor]], device: torch.device) -> Sequence[Tensor]:
        """Does the work."""
        return work()

    def join(self, result: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
        """Nothing to wait for."""
        return result


@contextmanager
def side(objective: Any, name: str, released: ModuleType | None, *, in_line: bool) -> Iterator[None]:
    """Let `objective` work with the targets called `name` within the block: same student, teacher, batches."""
    before = objective.config, objective.loss, objective.beside
    objective.config = replace(before[0], morph=name != TOKEN_WISE)
    if name == RELEASED:
        assert released is not None
        objective.loss = ReleasedLoss(before[1], released)
    if in_line:
        objective.beside = InLine()
    try:
        yield
    finally:
        objective.config, objective.loss, objective.beside = before
