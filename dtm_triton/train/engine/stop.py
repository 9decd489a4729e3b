"""Ctrl-C and SIGTERM: finish the step, save, leave with the exit code the shell expects; several processes together."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dtm_triton.train.engine.distributed import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was asked to stop and has saved; `exit_code` is 128 + the signal: 130 or 143."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """While this context is open, a first signal is only noted; a second one acts as it always does.

    >>> with StopRequest() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.number == signal.SIGTERM
    True
    """

    number: int = 0
    """The signal that came, 0 for none."""

    def __enter__(self) -> StopRequest:
        self._before: list[Any] = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)


class Agreement:
    """Every process hands in a number at every step and learns the largest of the step before, all the same.

    So all leave at the same step, one later than they were asked to. The exchange runs on CPUs while the step is
    computed: no GPU is waited for.

    >>> agreement = Agreement(Processes())
    >>> agreement.exchange(0), agreement.exchange(15)
    (0, 15)
    """

    def __init__(self, processes: Processes) -> None:
        self.group = processes.own_group()
        self.pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, number: int) -> int:
        """Hand in `number`; one process gets it back, several the largest of the call before."""
        if self.group is None:
            return number
        heard = self.finish()
        tensor = torch.tensor(number)
        self.pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True), tensor
        return heard

    def finish(self) -> int:
        """What the last exchange gave; nothing is left under way."""
        if self.pending is None:
            return 0
        work, tensor = self.pending
        self.pending = None
        work.wait()
        return int(tensor)
