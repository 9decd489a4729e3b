"""Drawing partitions on a GPU: one launch, no waiting, captured in graphs, the same bits on every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, needs_gpu
from torch.profiler import ProfilerActivity, profile

from dtm_triton.attention_masking import attention_partition, sample_partition
from dtm_triton.measure.overhead import capture
from dtm_triton.partition import Partition

pytestmark = needs_gpu

CASES: dict[str, dict[str, Any]] = {
    "paper": dict(grid=(14, 14), num_masked=88, num_thrown=78),
    "units": dict(grid=(14, 14), num_masked=88, num_thrown=52, unit=2),
    "released": dict(grid=(14, 14), num_masked=88, num_thrown=78, crop="released"),
    "large": dict(grid=(32, 32), num_masked=460, num_thrown=409),
    "several-tiles": dict(grid=(64, 64), num_masked=1800, num_thrown=1600),
}


def draw(name: str, batch: int = 128) -> tuple[dict[str, torch.Tensor], Callable[[], Partition]]:
    """Inputs, and a call that reads them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    places = torch.rand(batch, 4, generator=generator, device=DEVICE, dtype=torch.float64).sort(1).values
    maps = torch.randint(256, (batch, 14, 14), generator=generator, device=DEVICE, dtype=torch.uint8)
    inputs = {"maps": maps, "places": places, "seeds": torch.arange(batch, device=DEVICE), "flip": maps[:, 0, 0] > 127}
    return inputs, lambda: attention_partition(**inputs, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_one_launch(name: str) -> None:
    _, call = draw(name)
    weights, seeds = torch.rand(8, 196, device=DEVICE), torch.arange(8, device=DEVICE)
    for function in (call, lambda: sample_partition(weights, seeds, **CASES["paper"])):
        function()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        work = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(work) == 1, [event.name for event in work]


@pytest.mark.parametrize("name", CASES)
def test_the_host_does_not_wait(name: str) -> None:
    _, call = draw(name)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_draws_from_new_inputs() -> None:
    inputs, call = draw("paper")
    graph, results = capture(call)
    for _ in range(2):
        inputs["seeds"] += 1000
        inputs["maps"] ^= 85
        graph.replay()
        for found, expected in zip(results, call(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_beside_other_work(name: str) -> None:
    """A race or a missing barrier would show as a moving result; scratch memory holds what others left."""
    _, call = draw(name)
    first = [part.clone() for part in call()]
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(other):
            noise = (noise @ noise).tanh()
        for found, expected in zip(call(), first, strict=True):
            assert torch.equal(found, expected)
    torch.cuda.synchronize()
