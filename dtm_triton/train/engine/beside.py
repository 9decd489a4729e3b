"""Work beside the main CUDA stream: what needs only the teacher runs while the student computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", bound=Sequence[Tensor])


class Beside:
    """One further CUDA stream; on other devices work is done at once.

    >>> beside = Beside()
    >>> total = beside.start(lambda: [torch.ones(2).sum()], torch.device("cpu"))
    >>> beside.join(total, torch.device("cpu"))[0]
    tensor(2.)
    """

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    def start(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Begin `work` behind all that the current stream was given so far. Its result is there after `join`."""
        if device.type != "cuda":
            return work()
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            return work()

    def join(self, result: Result, device: torch.device) -> Result:
        """Let the current stream wait for the work that gave `result`."""
        if self.stream is not None and device.type == "cuda":
            current = torch.cuda.current_stream(device)
            current.wait_stream(self.stream)
            for tensor in result:
                tensor.record_stream(current)  # the side stream's memory is not given away while this one reads it
        return result
