"""Losses that are not finite and losses that jump: seen on the device, told at the next log line.

Nothing here makes the host wait: every step adds a few tensor operations, `read` is called where the loop waits anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPIKE = 3.0
"""A loss above this many times its running mean is a spike."""
DECAY = 0.98
"""Of the running mean: about the last 50 steps."""
SETTLED = 50
"""Steps before the mean is trusted."""


class Watch:
    """The first step that was not finite, the first spike since the last report, the running mean of the loss.

    >>> watch = Watch(torch.device("cpu"))
    >>> for step in range(60):
    ...     broken = watch.look(step, torch.tensor(1.0 if step != 55 else 4.0), torch.tensor(1.0))
    >>> watch.spike()
    (55, 4.0, 1.0)
    >>> watch.look(60, torch.tensor(1.0), torch.tensor(float("nan"))).item(), watch.bad_step()
    (1.0, 60)
    """

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.full((), -1, device=device)
        self._spike = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # step, loss, usual loss
        self.usual = torch.zeros(2, dtype=torch.float64, device=device)
        """Running mean of the loss, and steps in it: what a checkpoint keeps."""

    def look(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Note a step's loss and gradient norm; 1.0 from the first step on that was not finite, else 0.0."""
        # the norm is the same in all processes, so all agree; the loop sees to it that a bad loss has a bad gradient
        self._bad = self._bad.masked_fill((self._bad < 0) & ~norm.isfinite(), step)
        broken = self._bad >= 0
        mean, count = self.usual.unbind()
        loss = loss.double()
        jumped = (count >= SETTLED) & (loss > SPIKE * mean) & ~broken
        seen = torch.stack([torch.full_like(mean, step), loss, mean])
        self._spike = torch.where(jumped & (self._spike[0] < 0), seen, self._spike)
        # a spike moves the mean no further than its own threshold would
        level = torch.where(count >= SETTLED, torch.minimum(loss, SPIKE * mean), loss)
        weight = torch.maximum(1 / (count + 1), torch.full_like(count, 1 - DECAY))
        self.usual = torch.where(broken, self.usual, torch.stack([mean + weight * (level - mean), count + 1]))
        return broken.float()

    def spike(self) -> tuple[int, float, float] | None:
        """(step, loss, usual loss) of the first spike since the last call; waits for the device."""
        step, loss, usual = self._spike.tolist()
        self._spike = torch.full_like(self._spike, -1.0)
        return None if step < 0 else (int(step), loss, usual)

    def bad_step(self) -> int:
        """The first step that was not finite, -1 for none; waits for the device."""
        return int(self._bad)
