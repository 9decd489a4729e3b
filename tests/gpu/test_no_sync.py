"""The host never waits for the GPU, in any op, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, SMALL, ids, needs_gpu

from dtm_triton import morph, tome
from dtm_triton.measure.cases import Case, call, make_inputs

pytestmark = needs_gpu


@pytest.fixture
def detector() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Runs a function once, for what happens on first calls only, and then with synchronising forbidden."""

    def run(function: Callable[[], Any]) -> None:
        function()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        function()

    yield run
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_the_detector_detects(detector: Callable[[Callable[[], Any]], None]) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        detector(lambda: torch.ones(1, device=DEVICE).item())


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_no_op_waits(case: Case, detector: Callable[[Callable[[], Any]], None]) -> None:
    detector(call(case, make_inputs(case, DEVICE), "triton"))


def test_schedules_from_the_host_do_not_wait(detector: Callable[[Callable[[], Any]], None]) -> None:
    x = torch.randn(4, 196, 64, device=DEVICE, requires_grad=True)
    schedules = [morph.MorphSchedule((14,) * 7), morph.MorphSchedule((30,))]
    detector(lambda: morph.dtm_loss(x, x.detach().flip(0), schedules).backward())


@pytest.mark.parametrize("split", ["alternating", "random"])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_matching_options_do_not_wait(
    split: str, threshold: float | None, detector: Callable[[Callable[[], Any]], None]
) -> None:
    x = torch.randn(4, 196, 64, device=DEVICE)
    detector(lambda: morph.match_tokens(x, [14] * 7, split=split, threshold=threshold))  # type: ignore[arg-type]


def test_modules_do_not_wait(detector: Callable[[Callable[[], Any]], None]) -> None:
    x = torch.randn(4, 196, 64, device=DEVICE)
    merge, replace = morph.TokenMerge([14] * 7).to(DEVICE), morph.TokenMorph([14] * 7).to(DEVICE)
    loss = morph.DTMLoss().manual_seed(0)
    detector(lambda: (merge(x), replace(x), loss(x, x)))


def test_a_tome_step_does_not_wait(detector: Callable[[Callable[[], Any]], None]) -> None:
    metric, x = torch.randn(4, 197, 64, device=DEVICE), torch.randn(4, 197, 96, device=DEVICE)

    def step() -> None:
        merge, unmerge = tome.bipartite_soft_matching(metric, 16, class_token=True)
        merged, size = tome.merge_wavg(merge, x)
        unmerge(merged)
        tome.merge_wavg(merge, x, torch.ones_like(x[..., :1]))
        assert size.shape[1] == merged.shape[1]

    detector(step)
