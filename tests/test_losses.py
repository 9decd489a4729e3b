"""Properties of the losses, over every implementation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from backends import DEVICE, over_backends, property_test
from cases import Case, matching_cases
from hypothesis import strategies as st
from torch import Tensor

from dtm_triton import loss_ops, morph

KINDS = ("smooth_l1", "l1", "l2", "cosine")
KIND = st.sampled_from(KINDS)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest error of a gradient entry, relative to the largest entry, by dtype of the outputs."""


def pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a case: three units apart at most, so that smooth-L1 meets both its branches."""
    generator = torch.Generator().manual_seed(case.seed)
    outputs, targets = (3 * torch.randn(case.features.shape, generator=generator) for _ in range(2))
    return outputs.to(DEVICE, dtype), targets.to(DEVICE, dtype)


def value_and_gradient(outputs: Tensor, targets: Tensor, groups: morph.TokenGroups, **options: object) -> tuple:
    point = outputs.detach().clone().requires_grad_()
    loss = morph.morph_loss(point, targets, groups, **options)  # type: ignore[arg-type]
    loss.backward()
    return loss.detach(), point.grad


@property_test(case=matching_cases(), kind=KIND, normalize=st.booleans(), beta=st.sampled_from([0.0, 0.5, 2.0]))
def test_value_and_gradient_are_the_reference_s(
    backend: str, case: Case, kind: str, normalize: bool, beta: float
) -> None:
    groups = case.groups("portable")
    outputs, targets = pair(case, case.features.dtype)
    options = dict(kind=kind, normalize_target=normalize, beta=beta)
    loss, grad = value_and_gradient(outputs, targets, groups, **options, backend=backend)
    truth, slope = value_and_gradient(outputs.double(), targets.double(), groups, **options, backend="reference")
    assert loss.dtype == torch.float32 and grad.dtype == outputs.dtype
    assert abs(loss.item() - truth.item()) <= 2e-5 * max(1, abs(truth.item()))
    largest = slope.abs().max().item()
    assert (grad.double() - slope).abs().max().item() <= TOLERANCE[outputs.dtype] * largest + 1e-7


@property_test(case=matching_cases(), kind=st.sampled_from(KINDS[:3]))
def test_zero_exactly_when_morphed_tokens_are_equal(backend: str, case: Case, kind: str) -> None:
    groups = case.groups("portable")
    whole = pair(case)[0].round()
    shuffled = whole.clone()  # another image with the same group sums, in whole numbers: exact
    for image, group in itertools.product(range(len(whole)), range(groups.num_groups)):
        members = (groups.index[image] == group).nonzero().flatten()
        shuffled[image, members] = whole[image, members.roll(1)]
    assert morph.morph_loss(shuffled, whole, groups, kind, backend=backend).item() == 0
    shuffled[0, 0, 0] += 1
    assert morph.morph_loss(shuffled, whole, groups, kind, backend=backend).item() > 0


@property_test(case=matching_cases(kinds=("normal",)), kind=KIND, schedules=st.integers(1, 3))
def test_dtm_loss_is_matching_and_the_mean_of_losses(backend: str, case: Case, kind: str, schedules: int) -> None:
    outputs, targets = pair(case)
    protected, split = case.options["num_protected"], "alternating"
    drawn = [morph.MorphSchedule(tuple(case.removed[: 1 + index])) for index in range(schedules)]
    options = dict(kind=kind, beta=1.0, backend=backend)
    point = outputs.clone().requires_grad_()
    whole = morph.dtm_loss(point, targets, drawn, num_protected=protected, split=split, **options)
    whole.backward()
    parts = []
    for schedule in drawn:
        groups = morph.match_tokens(targets, schedule, num_protected=protected, split=split, backend=backend)
        parts.append(value_and_gradient(outputs, targets, groups, **options))
    torch.testing.assert_close(whole.detach(), torch.stack([loss for loss, _ in parts]).mean(), rtol=1e-5, atol=1e-6)
    expected = torch.stack([grad for _, grad in parts]).mean(0)
    torch.testing.assert_close(point.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(kind: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs, targets = (2 * torch.randn(2, 9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    groups = morph.match_tokens(targets, [3, 2])
    outputs.requires_grad_()
    schedules = [morph.MorphSchedule((3,)), morph.MorphSchedule((2, 2))]
    assert torch.autograd.gradcheck(
        lambda x: morph.morph_loss(x, targets, groups, kind, normalize_target=normalize), outputs
    )
    assert torch.autograd.gradcheck(lambda x: morph.dtm_loss(x, targets, schedules, kind=kind), outputs)


@over_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["outputs", "targets"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_loss(backend: str, kind: str, where: str, value: float) -> None:
    tensors = dict(outputs=torch.randn(2, 8, 3, device=DEVICE), targets=torch.randn(2, 8, 3, device=DEVICE))
    tensors[where][1, 5, 2] = value
    loss = morph.dtm_loss(tensors["outputs"], tensors["targets"], morph.MorphSchedule((3,)), kind=kind, backend=backend)
    assert not loss.isfinite()


@over_backends
def test_half_precision_gradients_do_not_underflow(backend: str) -> None:
    """At 128 images of 196 x 512 the scaled gradient is subnormal in float16; a loss scale must still save it."""
    outputs = torch.full((1, 4, 8), 0.25, dtype=torch.float16, device=DEVICE, requires_grad=True)
    targets = torch.zeros(1, 4, 8, dtype=torch.float16, device=DEVICE)
    loss = morph.dtm_loss(outputs, targets, morph.MorphSchedule((2,)), backend=backend)
    (loss * (2.0**15 * 32 / (128 * 196 * 512))).backward()
    assert outputs.grad is not None
    expected = torch.full_like(outputs, 0.125 * 2.0**15 / (128 * 196 * 512))
    torch.testing.assert_close(outputs.grad, expected, rtol=1e-2, atol=0)


@over_backends
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_strides_and_two_runs(backend: str, kind: str) -> None:
    outputs = torch.randn(2, 7, 30, device=DEVICE).transpose(1, 2)
    targets = torch.randn(2, 30, 14, device=DEVICE, dtype=torch.bfloat16)[:, :, ::2]
    groups = morph.match_tokens(targets, [9, 4], backend=backend)
    loss, grad = value_and_gradient(outputs, targets, groups, kind=kind, backend=backend)
    again, grad_again = value_and_gradient(outputs, targets, groups, kind=kind, backend=backend)
    assert loss.equal(again) and grad.equal(grad_again)
    truth, slope = value_and_gradient(outputs.double(), targets.double(), groups, kind=kind, backend="reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-7)


@over_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 1, 3), (2, 4, 1), (1, 1, 1)])
def test_smallest_shapes(backend: str, kind: str, shape: tuple[int, int, int]) -> None:
    outputs = torch.ones(shape, device=DEVICE, requires_grad=True)
    for normalize in (False, True):
        loss = morph.dtm_loss(
            outputs,
            torch.zeros(shape, device=DEVICE),
            morph.MorphSchedule((1, 1)),
            kind=kind,
            backend=backend,
            normalize_target=normalize,
        )
        (grad,) = torch.autograd.grad(loss, outputs)
        assert loss.isfinite() and grad.shape == outputs.shape and grad.isfinite().all()


@over_backends
def test_twice_backward_and_autocast(backend: str) -> None:
    outputs, targets = torch.randn(2, 12, 5, device=DEVICE, requires_grad=True), torch.randn(2, 12, 5, device=DEVICE)
    schedule = morph.MorphSchedule((4, 2))
    loss = morph.dtm_loss(outputs, targets, schedule, backend=backend)
    first = torch.autograd.grad(loss, outputs, retain_graph=True)[0]
    assert torch.autograd.grad(2 * loss, outputs)[0].equal(2 * first)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = morph.dtm_loss(outputs, targets, schedule, backend=backend)
    assert inside.dtype == torch.float32 and inside.equal(loss)


def test_a_second_derivative_is_refused() -> None:
    outputs, targets = torch.randn(1, 6, 3, requires_grad=True), torch.randn(1, 6, 3)
    loss = morph.dtm_loss(outputs, targets, morph.MorphSchedule((2,)))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, outputs, create_graph=True)


def test_nothing_is_saved_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Tensor] = []
    slopes: list[Tensor] = []
    groups = morph.match_tokens(torch.randn(1, 6, 3), [2])

    def spy(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def call(*arguments: object) -> tuple[Tensor, ...]:
            results = op(*arguments)
            slopes.append(results[1])
            return results

        return call

    for name in ("dtm_loss", "morph_loss"):
        monkeypatch.setattr(loss_ops, name, spy(getattr(loss_ops, name)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs, targets = torch.randn(1, 6, 3, requires_grad=True), torch.randn(1, 6, 3)
        with torch.no_grad():
            quiet = morph.dtm_loss(outputs, targets, morph.MorphSchedule((2,)))
        morph.dtm_loss(outputs.detach(), targets, morph.MorphSchedule((2,)))
        assert not quiet.requires_grad and not saved and [x.numel() for x in slopes] == [0, 0]
        morph.dtm_loss(outputs, targets, morph.MorphSchedule((2,)))
        assert saved and slopes[-1].numel()
        saved.clear()
        with torch.no_grad():
            morph.morph_loss(outputs, targets, groups)
        assert not saved and slopes[-1].numel() == 0


@over_backends
@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_half_precision_gradients_do_not_overflow(backend: str, kind: str) -> None:
    """The derivative per group may exceed float16 where the gradient, divided by the number of entries, does not."""
    scale = 4e4 if kind == "l2" else 2e-6
    outputs = (scale * torch.tensor([[[1.0, 0.5, -1.0, 1.0]]], device=DEVICE).repeat(1, 16, 1)).half()
    targets = torch.tensor([[[-4e4, 1e4, 0.0, 2e4]]], device=DEVICE).repeat(1, 16, 1)
    groups = morph.match_tokens(targets, [4], backend="portable")
    _, grad = value_and_gradient(outputs, targets, groups, kind=kind, backend=backend)
    _, truth = value_and_gradient(outputs.double(), targets.double(), groups, kind=kind, backend="reference")
    assert grad.dtype == torch.float16 and grad.isfinite().all()
    torch.testing.assert_close(grad.double(), truth, rtol=2e-3, atol=1e-3 * truth.abs().max().item())


@over_backends
def test_an_output_below_the_least_norm_counts_as_a_constant(backend: str) -> None:
    """Cosine: norms are held at 1e-8, so that below it the gradient is that of a plain inner product."""
    outputs, targets = torch.full((1, 2, 3), 1e-10, device=DEVICE), torch.randn(1, 2, 3, device=DEVICE)
    groups = morph.match_tokens(targets, [0], backend="portable")
    _, grad = value_and_gradient(outputs, targets, groups, kind="cosine", backend=backend)
    expected = -targets / targets.norm(dim=-1, keepdim=True) / 1e-8 / 2
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=0)


@over_backends
@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "cosine"])  # the sign of what is not a number is 0
def test_what_is_not_a_number_reaches_the_gradient(backend: str, kind: str) -> None:
    outputs, targets = torch.randn(1, 8, 3, device=DEVICE), torch.randn(1, 8, 3, device=DEVICE)
    groups = morph.match_tokens(targets, [3], backend="portable")
    outputs[0, 5, 2] = torch.nan
    _, grad = value_and_gradient(outputs, targets, groups, kind=kind, backend=backend)
    assert not grad[0, 5].isfinite().all()


@over_backends
def test_targets_may_be_wider_than_outputs(backend: str) -> None:
    outputs, targets = torch.randn(1, 8, 3, device=DEVICE), torch.randn(1, 8, 3, device=DEVICE)
    groups = morph.match_tokens(targets, [3], backend="portable")
    loss, grad = value_and_gradient(outputs, targets.double(), groups, backend=backend)
    assert loss.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(loss, value_and_gradient(outputs, targets, groups, backend="portable")[0])
