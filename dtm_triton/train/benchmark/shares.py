"""A stopwatch on the parts of a training step, put on a Trainer from outside; the loop knows nothing of it.

Marks divide a step without gaps: each ends the part before it, and begins one. They come from around the targets (the
teacher, or an average of the student) and the matching, from hooks of modules (student, objective) and of tensors (the
loss and the student's outputs, whose gradients bound the objective's own backward), from the backward's end, and from
the iterator over batches. On a GPU a mark is a CUDA event: nothing waits within a step, and "loader" is the time in
which the GPU has nothing to do because the batch is not there yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.profiler import record_function

from dtm_triton.measure.train_record import PARTS

Result = TypeVar("Result")


class Shares:
    """Times the parts of a Trainer's steps; with `traced` they are also named ranges of a profiler's trace."""

    def __init__(self, trainer: Any) -> None:
        self.device: torch.device = trainer.device
        self.traced = False
        self.marks: list[tuple[str, Any]] = []
        self.ranges: dict[int, Any] = {}  # by thread: a GPU's backward runs in one of its own
        objective = trainer.objective
        objective.register_forward_pre_hook(lambda *_: self.mark("rest"))
        objective.register_forward_hook(self._forward_done)
        objective.targets = self._timed("teacher", objective.targets)
        objective.network.register_forward_pre_hook(lambda *_: self.mark("student"), prepend=True)  # before shards meet
        objective.network.register_forward_hook(self._student_done)
        trainer.optimizer.register_step_pre_hook(lambda *_: self.mark("optimiser"))

    def mark(self, part: str) -> None:
        """End the part that runs and begin `part`; "" begins nothing."""
        if self.device.type == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self.marks.append((part, stamp))
        if self.traced:
            self._trace(part)

    def batches(self, incoming: Iterator[Any]) -> Iterator[Any]:
        """`incoming`, with the time that each batch is waited for."""
        while True:
            self.mark("loader")
            batch = next(incoming)
            self.mark("rest")
            yield batch

    def take(self) -> dict[str, float]:
        """Milliseconds of every part since the last call, which waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in pairwise(self.marks):
            if part:
                total[part] += start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
        self.marks = []
        return total

    @contextmanager
    def matching(self, module: Any) -> Iterator[None]:
        """Count `module.match` as the objective's while the block runs."""
        module.match = self._timed("objective", module.match)
        try:
            yield
        finally:
            del module.match

    def _timed(self, part: str, function: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
        def timed(tokens: Tensor) -> Result:
            self.mark(part)
            result = function(tokens)
            self.mark("rest")
            return result

        return timed

    def _student_done(self, _: nn.Module, __: Any, outputs: Tensor) -> None:
        self.mark("objective")
        if outputs.requires_grad:
            outputs.register_hook(lambda _: self.mark("student"))

    def _forward_done(self, _: nn.Module, __: Any, results: dict[str, Tensor]) -> None:
        self.mark("rest")
        if results["loss"].requires_grad:
            results["loss"].register_hook(self._backward_begins)

    def _backward_begins(self, _: Tensor) -> None:
        self.mark("objective")
        # DistributedDataParallel learns of the end in the same way
        Variable._execution_engine.queue_callback(lambda: self.mark("optimiser"))  # type: ignore[attr-defined]

    def _trace(self, part: str) -> None:
        thread = threading.get_ident()
        if open_range := self.ranges.pop(thread, None):
            open_range.__exit__(None, None, None)
        elsewhere = threading.current_thread() is not threading.main_thread()
        if part and not (elsewhere and part == "optimiser"):  # the step's own hook begins that in the main thread
            self.ranges[thread] = record_function(part)
            self.ranges[thread].__enter__()
