"""One process or several: who this one is, and the few things processes do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of a run, and its device."""

    rank: int = 0
    """Number of this process."""
    count: int = 1
    """Number of processes."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    timeout: timedelta = timedelta(minutes=10)
    """How long one waits for the others."""

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the processes; all must call it."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.count
        return values

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the processes' order; all must call it."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the processes' order, on the CPU; their number may differ."""
        return rows if self.count == 1 else torch.cat(self.gather(rows.cpu()))

    def from_first(self, work: Callable[[], Value], refusal: type[Exception]) -> Value:
        """What `work` gives in the first process, in all of them; a `refusal` it raises is raised in all."""
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = work()
            except refusal as error:
                result[1] = error
        if self.count > 1:
            dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def own_group(self) -> Any:
        """A further group of all processes, on CPUs, for what goes on beside the training; None for one process."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.count > 1 else None

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def join_processes(device: str = "auto", timeout_minutes: float = 10.0) -> Iterator[Processes]:
    """Join the processes that torchrun started, gloo on CPUs and nccl on GPUs; without torchrun be the only one.

    timeout_minutes: how long one process waits for the others before it gives up.
    Raises ValueError when a GPU is asked for and there is none.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(device=place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, store=_fresh_store(timeout), rank=rank, world_size=count, timeout=timeout)
    try:
        yield Processes(rank=rank, count=count, device=place, timeout=timeout)
    finally:
        dist.destroy_process_group()


def _fresh_store(timeout: timedelta) -> dist.Store:
    """Where processes learn of each other. torchrun keeps it when it starts them again on one host, with the addresses
    of the dead ones in it: every start reads and writes under a name of its own."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # several hosts may count their restarts differently
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else ''}", store)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for. Raises ValueError when a GPU is asked for and there is none.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that PyTorch finds here, got {device!r} without a GPU")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)
