"""Trainers of several recipes that take turns: whatever slows the machine for a while slows them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from dtm_triton.train.data.batches import Batch
from dtm_triton.train.engine.loop import Trainer

LOADED = 2  # batches of every recipe, used again and again


class Turns:
    """Times training steps of trainers that are ready, by their names; loading is not in it."""

    def __init__(self, trainers: dict[str, Trainer]) -> None:
        self.trainers = trainers
        self.batches = {name: _loaded(trainer) for name, trainer in trainers.items()}

    def run(self, turns: int, steps: int, warm_up: int, say: Callable[[str], None]) -> dict[str, list[float]]:
        """Milliseconds of a step of every recipe in every turn, in the mean of `steps` steps."""
        times: dict[str, list[float]] = {name: [] for name in self.trainers}
        for name in self.trainers:
            self._step_ms(name, warm_up)
        for turn in range(turns):
            for name, found in times.items():
                found.append(self._step_ms(name, steps))
                say(f"{turn + 1}/{turns} {name}: {found[-1]:.4g} ms a step")
        return times

    def _step_ms(self, name: str, steps: int) -> float:
        trainer = self.trainers[name]
        _synchronize(trainer.device)
        start = time.perf_counter()
        for _ in range(steps):
            trainer._train_step(self.batches[name])
        _synchronize(trainer.device)
        return 1e3 * (time.perf_counter() - start) / steps


def _loaded(trainer: Trainer) -> Iterator[Batch]:
    """A few batches again and again, each as its own dictionary: a step takes entries out."""
    batches = [trainer.batches[number] for number in range(LOADED)]
    if trainer.device.type == "cuda":
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
    return map(dict, cycle(batches))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
