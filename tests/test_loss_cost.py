"""What the loss costs, forward and backward together: launches and memory, counted with the kernels left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dtm_triton import loss_ops, morph
from dtm_triton.kernels import groups, loss, match, settings
from dtm_triton.measure.timing import peak_bytes

MODULES = {
    match: ("match_kernel", "gram_kernel"),
    loss: ("loss_kernel", "row_loss_kernel", "scale_kernel"),
    groups: ("members_kernel", "merge_kernel", "morph_kernel", "unmerge_kernel"),
}
FREE = {"empty", "empty_strided", "detach", "detach_", "slice", "as_strided", "view", "reshape", "contiguous", "to"}
"""Operators that launch nothing on the tensors they meet here."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches without a GPU")


class Counter:
    """Stands in for a kernel."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: object) -> Any:
        return lambda **arguments: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for module, kernels in MODULES.items():
        for name in kernels:
            monkeypatch.setattr(module, name, Counter(name, names))
    return names


def step(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str = "smooth_l1", normalize_target: bool = False
) -> Callable[[], object]:
    """A forward and a backward whose incoming gradient is there."""
    outputs, targets = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    outputs.requires_grad_()
    one, seed = torch.ones(()), torch.zeros(1).long()
    schedules = torch.tensor([[14] * 7, [3] * 7], dtype=torch.int32)

    def run() -> object:
        value, _ = loss_ops.dtm_loss(
            outputs, targets, schedules, seed, 0, False, kind, 2.0, normalize_target, True, "triton"
        )
        return torch.autograd.grad(value, outputs, one)

    return run


def run_loss(kind: str = "smooth_l1", normalize_target: bool = False) -> list[str]:
    """The PyTorch operators, other than free ones."""
    run = step((3, 196, 8), torch.float32, kind, normalize_target)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = {event.name.removeprefix("aten::") for event in profiler.events() if event.name.startswith("aten::")}
    return sorted(names - FREE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"kind": "cosine"}, {"normalize_target": True}], ids=str)
def test_at_most_four(
    fused: bool, options: dict[str, Any], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = settings.match_settings
    monkeypatch.setattr(settings, "match_settings", lambda *shape: replace(shipped(*shape), fused=fused))
    assert run_loss(**options) == []
    rows = "row_loss_kernel" if options else "loss_kernel"
    matching = ["match_kernel"] if fused else ["gram_kernel", "match_kernel"]
    assert launched == [*matching, rows, "scale_kernel"]
    assert len(launched) <= 4


def test_as_shipped(launched: list[str]) -> None:
    assert run_loss() == [] and len(launched) <= 4


def test_a_launch_of_pytorch_is_seen(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """The check above can fail."""
    forward = loss.loss_forward

    def wasteful(*arguments: Any, **options: Any) -> Any:
        value, slopes = forward(*arguments, **options)
        return value + 0, slopes

    from dtm_triton.kernels import launch

    monkeypatch.setattr(launch, "loss_forward", wasteful)
    assert "add" in run_loss()


@pytest.mark.usefixtures("launched")
def test_two_copies_of_the_outputs() -> None:
    """What the forward saves and the gradient; Gram matrices are gone by then. The inputs are not counted."""
    shape = (128, 196, 512)
    copy = 2 * torch.Size(shape).numel()
    peak = peak_bytes(step(shape, torch.bfloat16), torch.device("cpu"))
    assert 2 * copy <= peak < 2.01 * copy


def test_inference_launches_no_backward(launched: list[str]) -> None:
    outputs, targets = torch.randn(2, 30, 4), torch.randn(2, 30, 4)
    morph.dtm_loss(outputs, targets, morph.MorphSchedule((5, 5)), backend="triton")
    assert launched == ["match_kernel", "loss_kernel"]


def test_merging_by_its_own_similarity_is_one_launch(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dtm_triton import modules

    monkeypatch.setattr(modules, "choose_backend", lambda *_: "triton")
    morph.TokenMerge([5, 4])(torch.randn(2, 30, 4))
    assert launched == ["match_kernel"]
