"""The loss and its gradient: equal to autograd through the reference in float64, in guarded memory."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels import launch
from dtm_triton.kernels.settings import slope_dtype

KINDS = ("smooth_l1", "l1", "l2", "cosine")
SETTINGS = [
    dict(kind=kind, beta=beta, normalize_target=normalize)
    for kind, beta, normalize in product(KINDS, (0.4, 0.0), (False, True))
    if kind == "smooth_l1" or beta
]
PLAIN: dict[str, Any] = dict(kind="smooth_l1", beta=2.0, normalize_target=False)

over_tiles = pytest.mark.parametrize("backend", ["triton", "triton-small"], indirect=True)
over_settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
pytestmark = pytest.mark.usefixtures("guard")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def groups(batch: int, tokens: int, *removed: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """index, size (padded with zeros) and members [L, B, N]."""
    options: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False)
    found = reference.match(normal(batch, tokens, 8, seed=9).cpu(), torch.tensor(removed), 0, **options)
    return tuple(part.to(DEVICE) for part in found)  # type: ignore[return-value]


def loss_and_gradient(outputs: Tensor, targets: Tensor, parts: tuple[Tensor, ...], **settings: Any) -> Any:
    index, size, members = parts
    value, slopes = launch.loss_forward(outputs, targets, members, size, save=True, **settings)
    count = index.numel() * (1 if settings["kind"] == "cosine" else outputs.shape[2])
    gradient = launch.loss_backward(torch.ones((), device=DEVICE), slopes, 1 / max(count, 1), slopes.dtype)
    return value, gradient


def assert_as_defined(
    outputs: Tensor, targets: Tensor, parts: tuple[Tensor, ...], tolerance: float = 1e-6, **settings: Any
) -> None:
    x = outputs.double().requires_grad_()
    wanted = reference.loss(x, targets.double(), parts[0], parts[1], **settings)
    wanted.backward()
    value, gradient = loss_and_gradient(outputs, targets, parts, **settings)
    assert value.dtype == torch.float32 and value.shape == ()
    assert gradient.dtype == slope_dtype(outputs.dtype, settings["kind"], len(parts[0]))
    assert abs(value.item() - wanted.item()) <= tolerance * max(1, abs(wanted.item()))
    assert x.grad is not None
    # A cosine of one channel has gradient 0: rounding is then measured by what one entry can contribute.
    scale = max(x.grad.abs().max().item(), 1 / (parts[0].numel() * outputs.shape[2]))
    assert (gradient - x.grad).abs().max() <= tolerance * scale


@over_tiles
@over_settings
def test_loss_and_gradient(settings: dict[str, Any], backend: str) -> None:
    """Two schedules, one far down; strided outputs, targets of a wide spread."""
    outputs, targets = normal(2, 26, 23)[:, ::2], 3 * normal(2, 23, 13, seed=1).transpose(1, 2) + 1
    assert_as_defined(outputs, targets, groups(2, 13, [3, 2], [6, 3]), **settings)


@over_tiles
@pytest.mark.parametrize("channels", [1, 16, 65])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[1], SETTINGS[-2]], ids=str)
def test_widths(channels: int, settings: dict[str, Any], backend: str) -> None:
    assert_as_defined(normal(1, 9, channels), normal(1, 9, channels, seed=1), groups(1, 9, [3]), **settings)


@over_settings
def test_half_precision_of_either_side(settings: dict[str, Any]) -> None:
    for dtypes in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        outputs, targets = normal(2, 12, 20, dtype=dtypes[0]), normal(2, 12, 20, seed=1, dtype=dtypes[1])
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}[dtypes[0]]
        assert_as_defined(outputs, targets, groups(2, 12, [4]), tolerance, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides(kind: str) -> None:
    """No loss and no gradient where outputs equal targets; |x| has derivative 0 there."""
    x, parts = normal(2, 14, 6), groups(2, 14, [4, 3])
    value, gradient = loss_and_gradient(x, x, parts, kind=kind, beta=2.0, normalize_target=False)
    assert abs(value) < 1e-6 and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_zero_outputs(kind: str) -> None:
    """A cosine with nothing is 0; its derivative is bounded by the least norm."""
    outputs, targets, parts = torch.zeros(1, 6, 4, device=DEVICE), normal(1, 6, 4), groups(1, 6, [2])
    x = outputs.double().requires_grad_()
    wanted = reference.loss(x, targets.double(), parts[0], parts[1], kind=kind, beta=2.0, normalize_target=False)
    value, gradient = loss_and_gradient(outputs, targets, parts, kind=kind, beta=2.0, normalize_target=False)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6) and gradient.isfinite().all()


@over_tiles
@over_settings
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_reaches_the_loss(value: float, settings: dict[str, Any], backend: str) -> None:
    parts = groups(1, 9, [2])
    for side in range(2):
        sides = [normal(1, 9, 5), normal(1, 9, 5, seed=1)]
        sides[side][0, 4, 2] = value
        assert not loss_and_gradient(*sides, parts, **settings)[0].isfinite()


def test_a_small_scale_does_not_underflow() -> None:
    """float16 gradients of a large batch survive when the incoming gradient is a loss scale."""
    slopes = torch.full((1, 3, 4), 0.5, dtype=torch.float16, device=DEVICE)
    gradient = launch.loss_backward(torch.tensor(65536.0, device=DEVICE), slopes, 1e-9, torch.float16)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5 * 65536 * 1e-9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_other_dtypes(dtype: torch.dtype) -> None:
    """The incoming one, and the one that is asked for."""
    slopes, grad = normal(3, 7, 131), torch.tensor(2.0, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(launch.loss_backward(grad, slopes, 0.25, torch.float32), 0.5 * slopes)
    gradient = launch.loss_backward(grad, slopes, 0.25, torch.float16)
    torch.testing.assert_close(gradient, (0.5 * slopes).half(), rtol=1e-3, atol=1e-6)


def test_tokens_of_no_group_have_no_gradient() -> None:
    """On a GPU groups' values are not checked: sizes that count too few tokens leave no memory unwritten."""
    index, size, members = groups(2, 9, [3])
    size[0, :, -1] = 0
    size[0, 1, 4:] = 0
    _, gradient = loss_and_gradient(normal(2, 9, 5), normal(2, 9, 5, seed=1), (index, size, members), **PLAIN)
    assert gradient.isfinite().all()
    listed = size[0, 1].sum()
    assert (gradient[1, members[0, 1, listed:].long()] == 0).all()


def test_many_schedules_in_half_precision() -> None:
    """A sum of slopes of 1 that bfloat16 would leave at 256."""
    index, size, members = (part.expand(300, -1, -1) for part in groups(1, 4, []))
    outputs = torch.full((1, 4, 2), 5.0, dtype=torch.bfloat16, device=DEVICE)
    _, slopes = launch.loss_forward(outputs, 0 * outputs, members, size, save=True, **(PLAIN | {"kind": "l1"}))
    assert index.shape[0] == 300 and slopes.dtype == torch.float32 and (slopes == 300).all()


def test_nothing_saved_and_nothing_there() -> None:
    parts = groups(2, 6, [2])
    value, slopes = launch.loss_forward(normal(2, 6, 4), normal(2, 6, 4, seed=1), *parts[:0:-1], save=False, **PLAIN)
    assert slopes.shape == (0,) and value > 0
    empty = [part[:, :0] for part in parts]
    value, gradient = loss_and_gradient(normal(0, 6, 4), normal(0, 6, 4), tuple(empty), **PLAIN)
    assert value == 0 and gradient.shape == (0, 6, 4)


def test_the_same_bits_every_run(guard: Any) -> None:
    outputs, targets, parts = normal(2, 20, 33), normal(2, 20, 33, seed=1), groups(2, 20, [6], [9])
    first = loss_and_gradient(outputs, targets, parts, **PLAIN)
    guard.poison = 3
    again = loss_and_gradient(outputs, targets, parts, **PLAIN)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
