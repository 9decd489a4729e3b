"""How many kernels a call launches, counted by the profiler."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, SMALL, needs_gpu
from torch.profiler import ProfilerActivity, profile

from dtm_triton import morph
from dtm_triton.measure.cases import call, make_inputs

pytestmark = needs_gpu


def device_work(function: object) -> list[str]:
    """The names of everything that one call put on the GPU, after a first one."""
    function()  # type: ignore[operator]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()  # type: ignore[operator]
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_the_profiler_counts() -> None:
    x = torch.ones(1000, device=DEVICE)
    assert len(device_work(lambda: (x + 1) * 2)) == 2


@pytest.mark.parametrize("case", [c for c in SMALL if c.op == "dtm_loss"], ids=lambda case: case.name)
def test_a_loss_is_at_most_four_launches(case: object) -> None:
    """Forward and backward together, matching included, and nothing is copied or filled."""
    work = device_work(call(case, make_inputs(case, DEVICE), "triton"))  # type: ignore[arg-type]
    assert 2 <= len(work) <= 4, work


def test_token_merge_is_at_most_two_launches() -> None:
    x = torch.randn(4, 196, 64, device=DEVICE)
    merge = morph.TokenMerge([14] * 7).to(DEVICE)
    work = device_work(lambda: merge(x))
    kernels = [name for name in work if "memcpy" not in name.lower()]
    assert 1 <= len(kernels) <= 3, work  # the Gram matrix and the schedules, or both in one; sizes without the padding


def test_unmerging_and_morphing_launch_little() -> None:
    x = torch.randn(4, 196, 64, device=DEVICE)
    groups = morph.match_tokens(x, [14] * 7)
    assert len(device_work(lambda: morph.unmerge_tokens(x[:, :98], groups))) == 1
    assert len(device_work(lambda: morph.morph_tokens(x, groups))) <= 2  # sorting the tokens by group comes first
