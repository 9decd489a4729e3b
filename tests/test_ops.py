"""The custom ops: contracts, torch.compile, and what a training step needs of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backends import DEVICE, over_backends
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dtm_triton import loss_ops, morph, ops
from dtm_triton.matching import schedules_tensor

SEED = torch.zeros(1, dtype=torch.int64)
SCHEDULES = schedules_tensor([morph.MorphSchedule((3, 2)), morph.MorphSchedule((1,))])


def tokens(grad: bool = True) -> Tensor:
    """Outputs of a student when they need a gradient, else other numbers: targets."""
    x = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(int(grad))).to(DEVICE)
    return x.requires_grad_() if grad else x


def pair() -> tuple[Tensor, Tensor]:
    return tokens(), tokens(grad=False)


compiled_backends = pytest.mark.parametrize("backend", ["portable", "triton"], indirect=True)


@compiled_backends
@pytest.mark.parametrize(
    "call",
    [
        lambda b: (ops.match, (tokens(grad=False), SCHEDULES, SEED, 1, False, True, None, b)),
        lambda b: (ops.match, (tokens(grad=False), SCHEDULES, SEED, 0, True, False, None, b)),
        lambda b: (ops.match_merge, (tokens(), SCHEDULES[:1], SEED, 7, 0, False, False, None, b)),
        lambda b: (ops.merge, (tokens(), *groups(), "mean", b)),
        lambda b: (ops.merge, (tokens(), *groups(), "sum", b)),
        lambda b: (ops.merge, (tokens(), *groups(), "amax", b)),
        lambda b: (ops.unmerge, (tokens()[:, :7].detach().requires_grad_(), groups().index, b)),
        lambda b: (ops.morph, (tokens(), *groups(), b)),
        lambda b: (
            loss_ops.morph_loss,
            (tokens(), tokens(grad=False), *batched(), None, "smooth_l1", 2.0, False, True, b),
        ),
        lambda b: (loss_ops.morph_loss, (tokens(), tokens(grad=False), *batched(), None, "cosine", 2.0, True, True, b)),
        lambda b: (
            loss_ops.morph_loss,
            (tokens(), tokens(grad=False).double(), *batched(), None, "l2", 2.0, False, True, b),
        ),
        lambda b: (
            loss_ops.dtm_loss,
            (tokens(), tokens(grad=False), SCHEDULES, SEED, 0, False, "l1", 2.0, False, True, b),
        ),
    ],
    ids=[
        "match",
        "random",
        "match_merge",
        "mean",
        "sum",
        "amax",
        "unmerge",
        "morph",
        "smooth_l1",
        "cosine",
        "float64 targets",
        "dtm_loss",
    ],
)
def test_opcheck(backend: str, call: Callable[[str], tuple]) -> None:
    op, arguments = call(backend)
    torch.library.opcheck(op, arguments)


def groups() -> morph.TokenGroups:
    return morph.match_tokens(tokens(grad=False), [3, 2])


def batched() -> tuple[Tensor, Tensor]:
    index, size = groups()
    return index[None], size[None]


@compiled_backends
def test_a_compiled_loss_is_compiled_once_for_all_schedules(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    outputs, targets = tokens(), tokens(grad=False)

    def loss(outputs: Tensor, targets: Tensor, removed: Tensor) -> Tensor:
        return morph.dtm_loss(outputs, targets, removed, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for first in range(5):
        removed = torch.tensor([[first, 2], [1, first]], dtype=torch.int32)
        expected, actual = loss(outputs, targets, removed), compiled(outputs, targets, removed)
        assert actual.equal(expected)
        assert torch.autograd.grad(actual, outputs)[0].equal(torch.autograd.grad(expected, outputs)[0])
    assert counter.frame_count == 1


def test_numbers_may_change_in_compiled_code() -> None:
    """The checks of a threshold and of beta compile too."""
    x, outputs = tokens(grad=False), tokens()

    def groups_above(threshold: float) -> Tensor:
        return morph.match_tokens(x, [3], threshold=threshold).index

    def loss(beta: float) -> Tensor:
        return morph.dtm_loss(outputs, x, [morph.MorphSchedule((3,))], beta=beta)

    for function in (groups_above, loss):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(compiled(value).equal(function(value)) for value in (0.1, 0.2, 0.4))


def test_a_compiled_dtm_loss_draws_what_the_eager_one_draws() -> None:
    counter = CompileCounterWithBackend("inductor")
    outputs, targets = tokens(), tokens(grad=False)
    module = morph.DTMLoss(max_removed=12, max_iterations=4, split="random")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    results = []
    for function in (module, compiled):
        module.manual_seed(1)
        results.append([function(outputs, targets).item() for _ in range(6)])
    assert results[0] == results[1] and len(set(results[0])) > 2
    assert counter.frame_count == 1


@compiled_backends
def test_matching_and_merging_compile(backend: str) -> None:
    def reduce(x: Tensor) -> Tensor:
        groups = morph.match_tokens(x, [3, 2], backend=backend)
        return morph.unmerge_tokens(morph.merge_tokens(x, groups, backend=backend), groups, backend=backend)

    x = tokens(grad=False)
    assert torch.compile(reduce, fullgraph=True, backend="aot_eager")(x).equal(reduce(x))


@over_backends
def test_torch_empty_may_hold_anything(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the same when fresh memory is full of NaN and of wild integers."""
    outputs, targets = tokens(), tokens(grad=False)

    def everything() -> list[Tensor]:
        groups = morph.match_tokens(targets, [4, 2], backend=backend)
        schedules = [morph.MorphSchedule((4, 2)), morph.MorphSchedule((5,))]
        loss = morph.dtm_loss(outputs, targets, schedules, backend=backend)
        merged = [morph.merge_tokens(targets, groups, mode, backend=backend) for mode in ("mean", "sum", "amax")]
        whole = morph.morph_tokens(targets, groups, backend=backend)
        return [*groups, loss.detach(), *torch.autograd.grad(loss, outputs), *merged, whole]

    clean, empty = everything(), torch.empty

    def poisoned(*size: object, **options: object) -> Tensor:
        x = empty(*size, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan if x.is_floating_point() else 2**30 if x.dtype == torch.int32 else 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(a.equal(b) for a, b in zip(everything(), clean, strict=True))
