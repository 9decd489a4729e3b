"""Merging with weights in one pass, and ToMe's average on top of it, over every implementation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backends import DEVICE, over_backends, property_test
from cases import Case, matching_cases
from hypothesis import strategies as st
from torch import Tensor

from dtm_triton import morph, ops, tome
from dtm_triton.groups import weighted_merge_tokens

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-13}
"""Largest error of a mean of values of about 1, by dtype of the result."""

GROUPS = morph.TokenGroups(torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0]]).int(), torch.tensor([[2, 1, 1], [4, 0, 0]]).int())


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def to_device(groups: morph.TokenGroups) -> morph.TokenGroups:
    return morph.TokenGroups(*(part.to(DEVICE) for part in groups))


def by_definition(x: Tensor, weight: Tensor, groups: morph.TokenGroups) -> tuple[Tensor, Tensor]:
    """sum(weight * x) / sum(weight) with the dense source matrix, in float64; 0 where the weights add up to 0."""
    source = groups.source().double()
    total = source @ weight.double()
    merged = source @ (x.double() * weight.double()) / total.where(total != 0, 1.0)
    return merged.where(total != 0, 0.0), total


def close(actual: Tensor, expected: Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


@property_test(
    case=matching_cases(max_tokens=24), weights=st.sampled_from([torch.float32, torch.bfloat16]), zeros=st.booleans()
)
def test_it_is_the_definition(backend: str, case: Case, weights: torch.dtype, zeros: bool) -> None:
    groups, dtype = case.groups("portable"), case.features.dtype
    x = draw((*case.features.shape[:2], 7), case.seed).to(dtype)
    weight = draw((*x.shape[:2], 1), 1).abs().add(0.1).to(weights)
    if zeros:
        weight = weight * (draw(weight.shape, 2) > 0)
    merged, total = weighted_merge_tokens(x, weight, groups, backend=backend)
    assert (merged.dtype, total.dtype) == (dtype, weights)
    truth, truth_total = by_definition(x, weight, groups)
    close(merged, truth)
    close(total, truth_total)


@property_test(case=matching_cases(max_tokens=12), wanted=st.sampled_from([(True, False), (False, True), (True, True)]))
def test_gradients_are_those_of_the_definition(backend: str, case: Case, wanted: tuple[bool, bool]) -> None:
    groups = case.groups("portable")
    x, weight = draw((*case.features.shape[:2], 5)), draw((*case.features.shape[:2], 1), 1).abs() + 0.1
    weight = weight * (draw(weight.shape, 2) > 0) if not wanted[1] else weight
    gradients = []
    for function in (by_definition, partial(weighted_merge_tokens, backend=backend)):
        inputs = [x.clone().requires_grad_(wanted[0]), weight.clone().requires_grad_(wanted[1])]
        merged, total = function(*inputs, groups)
        assert total.requires_grad == wanted[1]
        value = (merged * draw(merged.shape, 3)).sum() + (total * draw(total.shape, 4)).sum()
        gradients.append(torch.autograd.grad(value, [z for z in inputs if z.requires_grad]))
    for expected, actual in zip(*gradients, strict=True):
        assert actual.dtype == torch.float32 and actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
def test_gradcheck(part: int) -> None:
    x, weight = (draw((2, 4, width), width).double().cpu().requires_grad_() for width in (3, 1))
    weight = (weight.abs() + 0.2).detach().requires_grad_()
    merge = partial(weighted_merge_tokens, groups=GROUPS)
    assert torch.autograd.gradcheck(lambda x, weight: merge(x, weight)[part], (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, weight: merge(x, weight)[part], (x, weight))


@over_backends
@pytest.mark.parametrize(("weight_scale", "grad"), [(1.0, 1e-5), (1e-8, 1.0), (1e3, 1.0)])
def test_gradients_of_float16_neither_vanish_nor_overflow(backend: str, weight_scale: float, grad: float) -> None:
    """A share of a small gradient, small weights, and totals beyond float16's range are float32 until the end."""
    groups = to_device(morph.TokenGroups(torch.tensor([[0, 1, 0, 0]]).int(), torch.tensor([[3, 1]]).int()))
    weight = weight_scale * torch.tensor([[[500.0], [1000.0], [200.0], [300.0]]], device=DEVICE)
    x = draw((1, 4, 3)).half().requires_grad_()
    merged, _ = morph.weighted_merge_tokens(x, weight, groups, backend=backend)
    (merged * grad).sum().backward()
    shares = torch.tensor([0.5, 1.0, 0.2, 0.3], device=DEVICE) * torch.tensor(grad).half().item()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, :, 0].float(), shares, rtol=0.02, atol=0)


@over_backends
def test_weights_that_add_up_to_zero(backend: str) -> None:
    """A row of zeros, and no gradient, instead of a division by zero."""
    x = torch.arange(1.0, 17.0, device=DEVICE).view(2, 4, 2).requires_grad_()
    weight = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]], device=DEVICE)[:, :, None].requires_grad_()
    merged, total = weighted_merge_tokens(x, weight, to_device(GROUPS), backend=backend)
    assert total.flatten().tolist() == [0, 0, 2, 0, 0, 0]
    assert merged.tolist() == [[[0, 0], [0, 0], [7, 8]], [[0, 0]] * 3]
    gradients = torch.autograd.grad(merged.sum(), [x, weight])
    assert gradients[0].tolist() == [[[0, 0]] * 3 + [[1, 1]], [[0, 0]] * 4] and gradients[1].eq(0).all()


@over_backends
def test_what_is_not_finite_stays_in_its_group(backend: str) -> None:
    x, weight = torch.ones(2, 4, 2, device=DEVICE), torch.ones(2, 4, 1, device=DEVICE)
    x[0, 2, 1], weight[0, 1] = torch.nan, torch.nan
    merged, total = weighted_merge_tokens(x, weight, to_device(GROUPS), backend=backend)
    assert merged.isfinite()[0].tolist() == [[True, False], [False, False], [True, True]] and merged[1].isfinite().all()
    assert total.isfinite()[0].flatten().tolist() == [True, False, True]


@over_backends
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 1, 3), (2, 4, 0)])
def test_smallest_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    x, weight = torch.ones(shape, device=DEVICE), torch.full((*shape[:2], 1), 0.5, device=DEVICE)
    groups = morph.match_tokens(torch.ones(*shape[:2], 2, device=DEVICE), [2], backend=backend)
    merged, total = weighted_merge_tokens(x, weight, groups, backend=backend)
    assert merged.shape == (shape[0], groups.num_groups, shape[2]) and merged.eq(1).all()
    assert total.equal(0.5 * groups.size[:, :, None])


@pytest.mark.parametrize("backend", ["portable", "triton"], indirect=True)
def test_opcheck(backend: str) -> None:
    x, weight = draw((2, 4, 3)).requires_grad_(), (draw((2, 4, 1), 1).abs() + 0.1).requires_grad_()
    torch.library.opcheck(ops.weighted_merge, (x, weight, *to_device(GROUPS), backend))
    torch.library.opcheck(ops.weighted_merge, (x, weight.detach(), *to_device(GROUPS), backend))


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tome_s_average_over_two_layers(backend: str, dtype: torch.dtype) -> None:
    """In one pass it is what three passes give, whose sums and products are rounded on the way."""
    x, size, expected, expected_size = draw((2, 21, 6)).to(dtype), None, draw((2, 21, 6)).to(dtype), None
    for layer in range(2):
        merge, unmerge = tome.bipartite_soft_matching(draw((2, x.shape[1], 5), layer), 6, True, backend=backend)
        expected, expected_size = tome.merge_wavg(lambda z, mode: merge(z, mode), expected, expected_size)  # noqa: B023
        x, size = tome.merge_wavg(merge, x, size)
        assert x.dtype == size.dtype == dtype and size.equal(expected_size) and unmerge(x).shape[1] == 21 - 6 * layer
        close(x, expected)


def test_tome_compiles_and_reads_x_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        merge, _ = tome.bipartite_soft_matching(x, 3, class_token=True)
        return tome.merge_wavg(merge, x, size)

    x, size = draw((2, 12, 4)), draw((2, 12, 1), 1).abs() + 1
    expected = step(x, size)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, size)
    assert all(a.equal(b) for a, b in zip(compiled, expected, strict=True))
    monkeypatch.setattr(ops, "merge", None)  # the sum that three passes take
    step(x, size)
