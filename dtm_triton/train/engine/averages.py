"""Metrics between two log lines: summed on the device, averaged over steps and processes when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtm_triton.train.engine.distributed import Processes


class Averages:
    """Sums of scalars by name; nothing waits for the device before `means`.

    >>> averages = Averages(Processes())
    >>> for loss in (1.0, 3.0): averages.add({"loss": torch.tensor(loss)}); averages.step()
    >>> averages.means()
    {'loss': 2.0}
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, values: Mapping[str, Tensor], parts: int = 1) -> None:
        """Scalars on the device; of one of `parts` micro-batches."""
        for name, value in values.items():
            share = value.detach().float() / parts
            self.sums[name] = self.sums[name] + share if name in self.sums else share

    def step(self) -> None:
        """A step is complete."""
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Over steps and processes; all processes must call it, after at least one step."""
        names = sorted(self.sums)
        stacked = torch.stack([self.sums[name].double() for name in names]) / self.steps
        return dict(zip(names, self.processes.mean(stacked).tolist(), strict=True))

    def plain(self) -> dict[str, Any]:
        """The state for a checkpoint; all processes must call it."""
        sums = {name: mean * self.steps for name, mean in self.means().items()} if self.steps else {}
        return {"sums": sums, "summed": self.steps}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from what `plain` gave."""
        device = self.processes.device
        self.sums = {name: torch.tensor(value, device=device) for name, value in plain["sums"].items()}
        self.steps = plain["summed"]
