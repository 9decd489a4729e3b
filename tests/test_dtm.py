"""DTMLoss in two steps: matching first, as when it runs beside the student, and schedules for captured graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import dtm, morph


def pair(batch: int = 2, tokens: int = 14) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    outputs, targets = (torch.randn(batch, tokens, 6, generator=generator).to(DEVICE) for _ in range(2))
    return outputs.requires_grad_(), targets


@pytest.fixture(params=["portable", "triton"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dtm, "choose_backend", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("options", [{}, {"split": "random"}, {"num_protected": 1, "kind": "cosine"}], ids=str)
def test_two_steps_are_one(chosen: str, options: dict) -> None:
    """The same loss, gradient and state of the draw, to the last bit."""
    loss = morph.DTMLoss(max_removed=12, max_iterations=3, **options)
    outputs, targets = pair()
    results = []
    for separate in (False, True):
        loss.manual_seed(1)
        assert (loss.draw(14) > 0).sum(1).max() == 3  # so that the order of groups matters
        value = loss(outputs, targets, loss.match(targets)) if separate else loss(outputs, targets)
        results.append((value, *torch.autograd.grad(value, outputs), loss.get_extra_state()))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_matching_may_be_used_twice() -> None:
    loss = morph.DTMLoss(max_removed=12, max_iterations=3).manual_seed(0)
    outputs, targets = pair()
    matching = loss.match(targets)
    assert loss(outputs, targets, matching).equal(loss(outputs, targets, matching))


def test_a_matching_of_other_tokens_is_refused() -> None:
    loss = morph.DTMLoss()
    matching = loss.match(pair(tokens=9)[1])
    with pytest.raises(ValueError, match=r"matching must be of \[2, 14\] tokens on .* like outputs, got \[2, 9\]"):
        loss(*pair(), matching)
    with pytest.raises(TypeError, match="matching must be what match"):
        loss(*pair(), tuple(matching))  # type: ignore[arg-type]


def test_a_matching_on_another_device_is_refused() -> None:
    loss = morph.DTMLoss()
    outputs, targets = pair()
    elsewhere = dtm.Matching(*(part.to("meta") for part in loss.match(targets)))
    with pytest.raises(ValueError, match=r"like outputs, got \[2, 14\] on meta"):
        loss(outputs, targets, elsewhere)


def test_a_matching_can_be_stored(tmp_path: Path) -> None:
    matching = morph.DTMLoss().match(pair()[1])
    torch.save(matching, tmp_path / "matching.pt")
    assert all(map(torch.equal, torch.load(tmp_path / "matching.pt", weights_only=True), matching))


def test_drawing_names_what_is_wrong() -> None:
    for wrong, error in (("a", TypeError), (-1, ValueError)):
        with pytest.raises(error, match="num_tokens must be"):
            morph.DTMLoss().draw(wrong)  # type: ignore[arg-type]


def test_drawn_schedules_are_those_of_the_next_call() -> None:
    """What a captured graph replays: dtm_loss with schedules copied into one tensor."""
    loss = morph.DTMLoss(num_schedules=3, max_removed=12, max_iterations=4)
    outputs, targets = pair()
    static = torch.zeros(3, 4, dtype=torch.int32)
    for seed in range(3):
        static.copy_(loss.manual_seed(seed).draw(14))
        assert morph.dtm_loss(outputs, targets, static).equal(loss.manual_seed(seed)(outputs, targets))


def test_a_loss_on_streamed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens take other kernels; what the loss's kernel needs of them is the same."""
    from dtm_triton.kernels import match, settings

    monkeypatch.setattr(settings, "MAX_MATRIX_TOKENS", 10)
    streamed, calls = match.stream_match, []
    monkeypatch.setattr(match, "stream_match", lambda *x, **options: calls.append(1) or streamed(*x, **options))
    outputs, targets = pair()
    found, wanted = (
        morph.dtm_loss(outputs, targets, morph.MorphSchedule((5,)), backend=backend)
        for backend in ("triton", "reference")
    )
    gradients = [torch.autograd.grad(value, outputs)[0] for value in (found, wanted)]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*gradients)
    assert calls == [1]
