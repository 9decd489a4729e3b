"""How long a call takes and how much memory it needs, on a GPU or on a CPU."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

LEAST_CALLS = 5
"""A median of fewer says little, however long a call takes."""

HEAD_START_MS = 20.0
"""The longest that a GPU is kept busy while the host submits the call that is timed."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Repeated calls in one process: the median and the interquartile range of their times, and how many they were."""

    median_ms: float
    iqr_ms: float
    calls: int


def measure(function: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Time calls of `function` for about `seconds`, after one that is not counted.

    On a GPU by events around the call. Before it the second-level cache is overwritten, again and again until the host
    can have submitted the whole call: launches cost nothing unless they outlast HEAD_START_MS or the function waits.

    >>> measure(lambda: torch.ones(10).sum(), torch.device("cpu"), seconds=0.01).calls >= LEAST_CALLS
    True
    """
    once = _cpu_ms if device.type == "cpu" else _Gpu(function, device).ms
    function()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - start < seconds:
        times.append(once(function))
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(median_ms=middle, iqr_ms=high - low, calls=len(times))


def host_ms(function: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Host time of a call that is not waited for: what checks, dispatch and launches cost.

    >>> host_ms(lambda: None, torch.device("cpu"), seconds=0.01).median_ms < 100
    True
    """
    function()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - start < seconds:
        if device.type == "cuda" and len(times) % 16 == 0:
            torch.cuda.synchronize(device)  # a full queue would make the host wait
        times.append(_cpu_ms(function))
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(median_ms=middle, iqr_ms=high - low, calls=len(times))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory PyTorch held during a call above what it held before.

    >>> peak_bytes(lambda: torch.ones(1000), torch.device("cpu"))
    4000
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def _cpu_ms(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


class _Gpu:
    """Times one call between two events, behind work that overwrites the cache and gives the host a head start."""

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * cache, 64 * 2**20), dtype=torch.uint8, device=device)
        self.device = device
        function()
        torch.cuda.synchronize(device)
        host = min(_cpu_ms(function), _cpu_ms(function))
        torch.cuda.synchronize(device)
        self.rounds = 1
        flush = self.ms(self.flush.zero_)
        self.rounds = max(1, round(min(2 * host, HEAD_START_MS) / flush))

    def ms(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            for _ in range(self.rounds):
                self.flush.zero_()
            start.record()
            function()
            end.record()
            end.synchronize()
        return start.elapsed_time(end)
