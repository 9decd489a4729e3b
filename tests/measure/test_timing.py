"""Timing and memory: that what is called is timed, in the right unit. No speed is asserted."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from dtm_triton.kernels import launch
from dtm_triton.measure import ceilings, overhead, timing
from dtm_triton.measure.baselines import Late, NotMeasured, compiled, time_limit

CPU = torch.device("cpu")


@pytest.mark.parametrize("clock", [timing.measure, timing.host_ms])
def test_a_sleep_takes_its_time(clock: object) -> None:
    found = clock(lambda: time.sleep(0.01), CPU, seconds=0.08)  # type: ignore[operator]
    assert 10 <= found.median_ms < 1000
    assert found.calls >= timing.LEAST_CALLS and 0 <= found.iqr_ms < 1000


def test_more_time_means_more_calls() -> None:
    short, long = (timing.measure(lambda: time.sleep(0.002), CPU, seconds=s).calls for s in (0.0, 0.1))
    assert short == timing.LEAST_CALLS < long


def test_memory_is_the_peak_above_what_was_held() -> None:
    held = torch.ones(1000)

    def call() -> torch.Tensor:
        first = held + 1  # 4,000 bytes
        second = first + 1  # 8,000
        del first
        return second + 1  # 8,000 again

    assert 8000 <= timing.peak_bytes(call, CPU) < 8100  # the ones that are added take a few bytes too


def test_ceilings_are_finite_and_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "PRODUCT_SIZE", {"cpu": 64})
    found = ceilings.measure_ceilings(CPU, 0.01, (torch.float32, torch.bfloat16))
    assert set(found.matrix_tflop_s) == {"float32", "bfloat16"}
    assert all(0 < rate < 1e4 for rate in (found.copy_gb_s, *found.matrix_tflop_s.values()))


def test_a_limit_interrupts() -> None:
    start = time.perf_counter()
    with pytest.raises(Late), time_limit(0.1):
        time.sleep(30)
    assert time.perf_counter() - start < 10
    time.sleep(0.15)  # nothing comes after the block


def test_a_limit_that_a_destructor_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __del__(self) -> None:
            time.sleep(0.2)  # an exception in here is printed and ignored

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    start = time.perf_counter()
    with pytest.raises(Late), time_limit(0.1):
        Slow()
        time.sleep(30)
    assert time.perf_counter() - start < 10


def test_what_does_not_compile_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        def fail() -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(NotMeasured, match="does not compile: RuntimeError"):
        compiled(lambda: (), 5.0)
    monkeypatch.setattr(torch, "compile", lambda function: lambda: time.sleep(30))
    with pytest.raises(NotMeasured, match="more than 0.1 s"):
        compiled(lambda: (), 0.1)


def test_silent_kernels_run_the_launchers_and_nothing_else() -> None:
    """The op allocates and returns, on the CPU, and afterwards the kernels are back."""
    before = dict(vars(launch))
    with overhead.silent_kernels():
        timings = overhead.host_overhead(CPU, 0.01)
    assert set(timings) == set(overhead.CASES)
    assert dict(vars(launch)) == before
    from dtm_triton.kernels import loss

    assert not isinstance(loss.loss_kernel, overhead.Silent)


def test_silent_kernels_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a call took the portable path, its host time would say nothing of the launchers."""
    launches = []
    monkeypatch.setattr(overhead.Silent, "__getitem__", lambda self, grid: lambda **arguments: launches.append(grid))
    overhead.host_overhead(CPU, 0.0)
    assert len(launches) >= 3 * timing.LEAST_CALLS  # match; the loss's match and forward, backward
