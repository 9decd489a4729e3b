"""Several processes that train together, started within a moment: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from dtm_triton.train.engine.distributed import Processes, join_processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("dtm_triton.train.pretrain", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
        *("torch.utils.tensorboard", "sklearn.datasets"),
    ]
)


def run_together(count: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> None:
    """Call `work(processes, *arguments)` in `count` processes on gloo; AssertionError when one fails or hangs.

    `work` is a function of a module in tests/, so that the processes can import it.
    """
    port = free_port()
    children = [
        CONTEXT.Process(target=_join, args=(rank, count, port, work, arguments), daemon=True) for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * count, f"exit codes {codes}"


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(rank: int, count: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    with join_processes("cpu", timeout_minutes=1) as processes:
        assert isinstance(processes, Processes)
        work(processes, *arguments)
