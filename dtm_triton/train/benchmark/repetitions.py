"""One Trainer whose objective takes turns between the targets compared, repetition by repetition."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dtm_triton.measure.timing import peak_bytes
from dtm_triton.measure.train_record import PARTS, Side
from dtm_triton.train.benchmark.shares import Shares
from dtm_triton.train.benchmark.sides import DTM, RELEASED, TOKEN_WISE, side
from dtm_triton.train.engine.loop import Trainer

WARM_UP = 2  # steps of every side that are not counted
TRACED = 2  # steps in a trace


class Repetitions:
    """Runs steps of `trainer`, a pre-training one, in turn with every kind of targets.

    On a GPU every repetition runs twice: as it is trained, for the time of a step, and with matching in line, so that
    the parts follow each other and sum to a step. On a CPU nothing runs beside anything, and one run gives both.
    """

    def __init__(self, trainer: Trainer, incoming: Iterator[Any], released: ModuleType | None) -> None:
        self.trainer, self.released = trainer, released
        self.objective: Any = trainer.objective
        self.device = trainer.device
        self.shares = Shares(trainer)
        self.incoming = self.shares.batches(incoming)
        self.names = [DTM, TOKEN_WISE, *([RELEASED] if released else [])]

    def run(self, repetitions: int, steps: int, say: Callable[[str], None]) -> list[Side]:
        """All sides, `repetitions` times `steps` steps each, the sides taking turns."""
        peaks = {name: self._peak(name) for name in self.names}  # and warms up
        times: dict[str, list[float]] = {name: [] for name in self.names}
        parts: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in self.names}
        for number in range(repetitions):
            for name in self.names:
                step_ms, found = self._steps(name, steps, in_line=False)
                if self.device.type == "cuda":
                    _, found = self._steps(name, steps, in_line=True)
                times[name].append(step_ms)
                for part, ms in found.items():
                    parts[name][part].append(ms)
                say(f"{number + 1}/{repetitions} {name}: {step_ms:.4g} ms a step")
        return [
            Side(name=name, step_ms=times[name], parts_ms=parts[name], peak_bytes=peaks[name]) for name in self.names
        ]

    def trace(self, path: Path | None) -> None:
        """Write a few steps as a Chrome trace, which Perfetto opens; the parts are named ranges in it.

        None: take the steps, which other processes wait for, and write nothing.
        """
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.shares.traced = True
        try:
            with profile(activities=activities) as profiler:
                self._steps(DTM, TRACED, in_line=False)
        finally:
            self.shares.traced = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

    def _steps(self, name: str, steps: int, *, in_line: bool) -> tuple[float, dict[str, float]]:
        """Milliseconds of a step, and of its parts, in the mean of `steps` steps."""
        with side(self.objective, name, self.released, in_line=in_line):
            watched = nullcontext() if name == TOKEN_WISE else self.shares.matching(self.objective.loss)
            with watched:
                self._synchronize()
                self.shares.take()
                start = time.perf_counter()
                for _ in range(steps):
                    self.trainer._train_step(self.incoming)
                self.shares.mark("")
                self._synchronize()
                spent = 1e3 * (time.perf_counter() - start)
        return spent / steps, {part: ms / steps for part, ms in self.shares.take().items()}

    def _peak(self, name: str) -> int:
        """Bytes of weights, moments and teacher, and the most that a step allocates above them."""
        for _ in range(WARM_UP):
            self._steps(name, 1, in_line=False)
        above = peak_bytes(lambda: self._steps(name, 1, in_line=False), self.device)
        moments = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        held = [*self.objective.parameters(), *self.objective.buffers(), *moments]
        return above + sum(_local(tensor).nbytes for tensor in held)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _local(tensor: Any) -> torch.Tensor:
    """This process's shard of a distributed tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
