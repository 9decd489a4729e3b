"""Properties of merging, unmerging and morphing, over every implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from backends import DEVICE, over_backends, property_test
from cases import Case, matching_cases
from torch import Tensor

from dtm_triton import morph, reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-14}
"""Largest error of a mean of values of about 1, by dtype of the result."""


def tokens(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens to merge, three channels fewer or more than the features have."""
    batch, count, channels = case.features.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels + 3, generator=generator).to(DEVICE, dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


@property_test(case=matching_cases())
def test_merging_is_the_reference_s(backend: str, case: Case) -> None:
    groups, x = case.groups("portable"), tokens(case, case.features.dtype)
    for mode in ("mean", "sum", "amax"):
        merged = morph.merge_tokens(x, groups, mode, backend=backend)
        assert merged.dtype == x.dtype
        close(merged, reference.merge(x.double(), *groups, mode))
    close(morph.morph_tokens(x, groups, backend=backend), reference.morph(x.double(), *groups))


@property_test(case=matching_cases())
def test_merging_undoes_unmerging(backend: str, case: Case) -> None:
    groups = case.groups("portable")
    merged = torch.randn(len(case.features), groups.num_groups, 5, device=DEVICE)
    merged = merged * (groups.size > 0)[:, :, None]  # what pads comes out as 0
    spread = morph.unmerge_tokens(merged, groups, backend=backend)
    close(morph.merge_tokens(spread, groups, backend=backend), merged)
    assert morph.merge_tokens(spread, groups, "amax", backend=backend).equal(merged)
    for image in range(len(merged)):
        assert spread[image].equal(merged[image][groups.index[image].long()])


@property_test(case=matching_cases())
def test_morphing_is_a_symmetric_projection(backend: str, case: Case) -> None:
    groups, x, y = case.groups("portable"), tokens(case), tokens(case, seed=1)

    def project(z: Tensor) -> Tensor:
        return morph.morph_tokens(z, groups, backend=backend)

    close(project(3 * x - y), 3 * project(x) - project(y))  # linear
    close(project(project(x)), project(x))  # idempotent
    close((project(x) * y).sum()[None] / x.numel(), (x * project(y)).sum()[None] / x.numel())  # self-adjoint
    close(project(x).sum(1), x.sum(1))  # keeps the sum


@property_test(case=matching_cases(max_tokens=12))
def test_gradients_are_those_of_the_reference(backend: str, case: Case) -> None:
    groups, x = case.groups("portable"), tokens(case)
    x = (x * 4).round() / 4  # some members tie for the maximum
    merge, morphed, unmerge = (
        partial(function, backend=backend)
        for function in (morph.merge_tokens, morph.morph_tokens, morph.unmerge_tokens)
    )
    for mode in ("mean", "sum", "amax"):
        same_gradient(x, lambda z: reference.merge(z, *groups, mode), lambda z: merge(z, groups, mode))  # noqa: B023
    same_gradient(x, lambda z: reference.morph(z, *groups), lambda z: morphed(z, groups))
    merged = reference.merge(x, *groups, "mean")
    same_gradient(merged, lambda z: reference.unmerge(z, groups.index), lambda z: unmerge(z, groups))


def same_gradient(x: Tensor, expected: Callable[[Tensor], Tensor], actual: Callable[[Tensor], Tensor]) -> None:
    """The two functions have the same gradient at x, for one random direction of their result."""
    gradients = []
    for function in (expected, actual):
        point = x.clone().requires_grad_()
        result = function(point)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        gradients.append(torch.autograd.grad(result, point, direction)[0])
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
def test_gradcheck(mode: str, threshold: float | None) -> None:
    features = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = morph.match_tokens(features, [3, 2], threshold=threshold)
    x = features.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: morph.merge_tokens(z, groups, mode), x)
    assert torch.autograd.gradgradcheck(lambda z: morph.merge_tokens(z, groups, mode), x)
    assert torch.autograd.gradcheck(lambda z: morph.morph_tokens(z, groups), x)
    merged = morph.merge_tokens(features, groups).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: morph.unmerge_tokens(z, groups), merged)


@over_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(backend: str, value: float) -> None:
    index, size = torch.tensor([[0, 1, 0, 2]]), torch.tensor([[2, 1, 1]])
    groups = morph.TokenGroups(index.int().to(DEVICE), size.int().to(DEVICE))
    x = torch.ones(1, 4, 2, device=DEVICE)
    x[0, 2, 1] = value
    for mode in ("mean", "sum", "amax"):
        merged = morph.merge_tokens(x, groups, mode, backend=backend)
        assert merged.isfinite().tolist() == [[[True, False], [True, True], [True, True]]]
    assert morph.morph_tokens(x, groups, backend=backend).isfinite()[0, :, 1].tolist() == [False, True, False, True]


@over_backends
def test_two_runs_give_the_same_bits(backend: str) -> None:
    x = torch.randn(2, 40, 33, device=DEVICE)
    groups = morph.match_tokens(x, [15, 10, 5], backend=backend)
    first = [morph.merge_tokens(x, groups, backend=backend), morph.morph_tokens(x, groups, backend=backend)]
    second = [morph.merge_tokens(x, groups, backend=backend), morph.morph_tokens(x, groups, backend=backend)]
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@over_backends
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 1, 3), (2, 4, 0)])
def test_smallest_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    x = torch.ones(shape, device=DEVICE)
    groups = morph.match_tokens(torch.ones(*shape[:2], 2, device=DEVICE), [2], backend=backend)
    merged = morph.merge_tokens(x, groups, backend=backend)
    assert merged.shape == (shape[0], groups.num_groups, shape[2]) and merged.eq(1).all()
    assert morph.unmerge_tokens(merged, groups, backend=backend).equal(x)
    assert morph.morph_tokens(x, groups, backend=backend).equal(x)


@over_backends
def test_images_with_fewer_groups(backend: str) -> None:
    """Rows past an image's last group are 0 and take no part: not in the results, nor in gradients."""
    index, size = torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0]]), torch.tensor([[2, 1, 1], [4, 0, 0]])
    groups = morph.TokenGroups(index.int().to(DEVICE), size.int().to(DEVICE))
    assert groups.count.tolist() == [3, 1]
    x = torch.arange(16.0, device=DEVICE).view(2, 4, 2).requires_grad_()
    wanted = {"mean": [11.0, 12], "sum": [44.0, 48], "amax": [14.0, 15]}
    for mode, values in wanted.items():
        merged = morph.merge_tokens(x, groups, mode, backend=backend)  # type: ignore[arg-type]
        assert merged[1].tolist() == [values, [0, 0], [0, 0]]
        slope = torch.autograd.grad(merged.sum(), x, create_graph=True)[0]
        share = {"mean": [0.25] * 4, "sum": [1.0] * 4, "amax": [0.0, 0, 0, 1]}[mode]
        assert slope[1, :, 0].tolist() == slope[1, :, 1].tolist() == share
    morphed = morph.morph_tokens(x, groups, backend=backend)
    assert morphed[1].tolist() == [[11.0, 12]] * 4
    spread = morph.unmerge_tokens(merged, groups, backend=backend)
    assert torch.autograd.grad(spread.sum(), merged)[0][1].tolist() == [[4.0, 4], [0, 0], [0, 0]]
    loss = morph.morph_loss(x, x.detach() + 1, groups, "l2", backend=backend)
    assert loss.item() == pytest.approx(1, rel=1e-6) and torch.autograd.grad(loss, x)[0].isfinite().all()


@over_backends
def test_strided_and_expanded_tokens(backend: str) -> None:
    x = torch.randn(2, 6, 17, device=DEVICE).transpose(1, 2)
    groups = morph.match_tokens(x, [5], backend=backend)
    close(morph.merge_tokens(x, groups, backend=backend), reference.merge(x.contiguous(), *groups, "mean"))
    wide = torch.randn(2, 17, 1, device=DEVICE).expand(-1, -1, 9)
    close(morph.morph_tokens(wide, groups, backend=backend), reference.morph(wide.contiguous(), *groups))
