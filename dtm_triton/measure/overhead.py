"""What a call costs besides the work on the GPU: host time with the kernels taken out, and a graph's replay time.

On a GPU the host time is measured as it is, without waiting for the GPU. Without one, kernels are replaced by functions
that do nothing: checks, dispatch, autograd, allocation and the launchers' own code remain, Triton's launch does not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dtm_triton import backend
from dtm_triton.measure.cases import Case, call, make_inputs
from dtm_triton.measure.timing import Timing, host_ms, measure

TINY = dict(batch=2, tokens=16, channels=16, dtype=torch.float32)

CASES = {
    "match_tokens": Case(op="match", **TINY, schedules=((2, 2),)),  # type: ignore[arg-type]
    "dtm_loss forward + backward": Case(op="dtm_loss", **TINY, schedules=((2, 2), (2, 2))),  # type: ignore[arg-type]
}


class Silent:
    """Stands in for a kernel: takes any launch and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda **arguments: None


def host_overhead(device: torch.device, seconds: float) -> dict[str, Timing]:
    """Host time of tiny calls by name; with silent kernels where `device` is a CPU.

    >>> sorted(host_overhead(torch.device("cpu"), 0.01))
    ['dtm_loss forward + backward', 'match_tokens']
    """
    silent = silent_kernels() if device.type == "cpu" else contextlib.nullcontext()
    timings = {}
    with silent:
        for name, case in CASES.items():
            timings[name] = host_ms(call(case, make_inputs(case, device), "triton"), device, seconds)
    return timings


@contextlib.contextmanager
def silent_kernels() -> Iterator[None]:
    """Within the block every kernel does nothing, and backend="triton" takes CPU tensors."""
    from dtm_triton.kernels import launch  # noqa: F401  (the launchers, so that their kernels are there to replace)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "triton_unavailable", lambda device: None))
        for name, module in list(sys.modules.items()):
            if name.startswith("dtm_triton.kernels."):
                for attribute, value in list(vars(module).items()):
                    if attribute.endswith("_kernel") and not isinstance(value, type(sys)):
                        stack.enter_context(mock.patch.object(module, attribute, Silent()))
        yield


def graph_replay(case: Case, device: torch.device, seconds: float) -> Timing:
    """Time to replay `case` captured in a CUDA graph: all its launches, no host."""
    function = call(case, make_inputs(case, device), "triton")
    graph, _ = capture(function)
    return measure(graph.replay, device, seconds)


def capture(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Any, tuple[Tensor, ...]]:
    """A CUDA graph of one call, and the tensors that its replays fill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results
