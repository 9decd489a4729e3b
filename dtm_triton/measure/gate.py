"""The correctness gate: nothing is timed or tuned whose results are not the reference's.

Inputs are drawn for it. Groups must be equal to the last index wherever no decision hangs on rounding; tensors are held
to the reference in float64 by the norm of their difference and by its largest element.
B images, N tokens, C channels, L schedules, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dtm_triton import ops, reference
from dtm_triton.matching import schedules_tensor
from dtm_triton.measure.cases import Case, Inputs, call, make_inputs
from dtm_triton.measure.margins import ROUNDING, decision_margins
from dtm_triton.schedule import MorphSchedule

NORM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Bounds on |result - truth| / |truth|: a few times what rounding to the dtype gives."""

LARGEST = 6
"""The largest element of the difference may be this many roundings of the largest element of the truth."""

UNDECIDED = 0.01
"""Of one iteration's tokens, this share may change groups because their similarities tie but for rounding."""

MANY_TOKENS = 256
"""Ranking more than this, some two are always close: then a matching that keeps the order is checked as well."""

REPLAYED_BYTES = 2**31
"""Images are compared in chunks whose matrices fit in here (or one at a time)."""


def check(case: Case, backend: str, device: torch.device, seed: int = 1) -> None:
    """Raise AssertionError unless `backend` computes `case` as the reference does in float64, on fresh inputs.

    >>> check(Case(op="match", batch=2, tokens=12, channels=8, schedules=((3, 2),)), "portable", torch.device("cpu"))
    """
    inputs = make_inputs(case, device, seed)
    if case.op not in ("match", "match_merge", "dtm_loss", "tome_step"):
        _check_tensors(case, inputs, call(case, inputs, backend)())
        return
    clustered, signs = _matching_features(inputs.features, seed)
    several = any(len(schedule) > 1 for schedule in case.schedules)
    if several and case.tokens > MANY_TOKENS:
        _check_groups(case, clustered, *_match(case, clustered, True, backend), keep_order=True)
    for features in (clustered,) if several else (clustered, signs):
        drawn = replace(inputs, features=features)
        results = call(case, drawn, backend)()
        if case.op in ("match", "match_merge"):
            index, size = (part[None] for part in results[-2:])
        else:
            index, size = _match(case, features, case.protected > 0, backend)
        _check_groups(case, features, index, size, keep_order=case.protected > 0, exact=features is signs)
        _check_matched(case, drawn, results, index, size)


def _matching_features(like: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens near and far from centres; and tokens of -1 and 1, whose similarities often tie and never round."""
    batch, tokens, channels = like.shape
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.randn(like.shape, device=like.device, generator=generator)
    centres = torch.randn(batch, max(2, tokens // 8), channels, device=like.device, generator=generator)
    member = torch.randint(centres.shape[1], (batch, tokens, 1), device=like.device, generator=generator)
    spread = 2 * torch.rand(batch, tokens, 1, device=like.device, generator=generator)
    clustered = centres.gather(1, member.expand_as(like)) + spread * noise
    signs = torch.where(noise > 0, 1.0, -1.0)
    used = 4 ** ((channels.bit_length() - 1) // 2)  # lengths that are powers of two divide without rounding
    signs[:, :, torch.randperm(channels, device=like.device, generator=generator)[used:]] = 0
    return clustered.to(like.dtype), signs.to(like.dtype)


def _match(case: Case, features: Tensor, keep_order: bool, backend: str) -> tuple[Tensor, Tensor]:
    """index and size [L, B, N] of all the case's schedules, as a loss matches them."""
    removed = schedules_tensor([MorphSchedule(schedule) for schedule in case.schedules])
    if backend == "reference":
        options = dict(num_protected=case.protected, random_split=False, keep_order=keep_order)
        return reference.match(features, removed, 0, **options)[:2]  # type: ignore[arg-type]
    seed = torch.zeros(1, dtype=torch.int64)
    return ops.match(features, removed, seed, case.protected, False, keep_order, None, backend)[:2]


def _check_groups(
    case: Case, features: Tensor, index: Tensor, size: Tensor, *, keep_order: bool, exact: bool = False
) -> None:
    """index and size [L, B, N] against the reference's, chunk by chunk."""
    chunk = max(1, REPLAYED_BYTES // (8 * case.tokens**2))
    options = dict(num_protected=case.protected, random_split=False, keep_order=keep_order)
    for schedule, groups, sizes in zip(case.schedules, index, size, strict=True):
        assert groups.min() >= 0 and groups.max() < sizes.shape[1], "group indices out of range"
        assert torch.equal(ops.group_sizes(groups, sizes.shape[1]), sizes), "sizes do not count the tokens"
        removed, decided_images = torch.tensor([schedule], dtype=torch.int32), 0
        for first in range(0, case.batch, chunk):
            images = slice(first, first + chunk)
            double = features[images].double()
            wrong = reference.match(double, removed, 0, **options)[0][0] != groups[images]  # type: ignore[arg-type]
            if exact:
                assert not wrong.any(), f"{int(wrong.sum())} tokens are in wrong groups, though nothing rounds"
            elif len(schedule) == 1:
                share = wrong.double().mean().item()
                assert share <= UNDECIDED, f"{share:.1%} of the tokens are in wrong groups"
            decided = decision_margins(double, schedule, case.protected, keep_order)[1] > ROUNDING
            decided_images += int(decided.sum())
            astray = int((wrong.any(1) & decided).sum())
            assert not astray, f"{astray} of {int(decided.sum())} images are in wrong groups, where nothing is close"
        compared = decided_images or exact or len(schedule) == 1 or (case.tokens > MANY_TOKENS and not keep_order)
        assert compared, "every image hangs on rounding: nothing was compared"


def _check_matched(case: Case, inputs: Inputs, results: tuple[Tensor, ...], index: Tensor, size: Tensor) -> None:
    """What comes with the groups, given the groups."""
    if case.op == "match_merge":
        truth = reference.merge(inputs.features.double(), index[0], size[0], "mean")
        _check_close("merged", results[0], truth, case.dtype)
    elif case.op == "tome_step":
        assert inputs.tokens is not None and inputs.weights is not None
        (groups,) = case.num_groups
        weights, sizes = inputs.weights.double(), size[0, :, :groups]
        total = reference.merge(weights, index[0], sizes, "sum")
        weighted = reference.merge(inputs.tokens.double() * weights, index[0], sizes, "sum")
        _check_close("merged", results[0], weighted / total, case.dtype)
        _check_close("sizes", results[1], total, case.dtype)
    elif case.op == "dtm_loss":
        _check_loss(inputs, results, index, size, case.dtype)


def _check_tensors(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> None:
    """The ops that take groups."""
    assert inputs.groups is not None
    index, size = inputs.groups
    if case.op == "morph_loss":
        _check_loss(inputs, results, index[None], size[None], case.dtype)
        return
    x = inputs.features.double()
    truth = {
        "merge": lambda: reference.merge(x, index, size, "mean"),
        "unmerge": lambda: reference.unmerge(x, index),
        "morph": lambda: reference.morph(x, index, size),
    }[case.op]()
    _check_close(case.op, results[0], truth, case.dtype)


def _check_loss(inputs: Inputs, results: tuple[Tensor, ...], index: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """The loss and its gradient against those that autograd finds in float64."""
    assert inputs.outputs is not None
    outputs = inputs.outputs.detach().double().requires_grad_()
    options = dict(kind="smooth_l1", beta=2.0, normalize_target=False)
    loss = reference.loss(outputs, inputs.features.double(), index, size.clamp(min=1), **options)  # type: ignore[arg-type]
    assert inputs.grad is not None
    (grad,) = torch.autograd.grad(loss, outputs, inputs.grad.double())
    _check_close("loss", results[0], loss.detach(), torch.float32)
    _check_close("gradient", results[1], grad, dtype)


def _check_close(name: str, result: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert result.shape == truth.shape, f"{name} has shape {list(result.shape)}, not {list(truth.shape)}"
    difference = result.detach().double() - truth
    norm = (difference.norm() / truth.norm().clamp(min=1e-300)).item()
    assert norm <= NORM[dtype], f"{name} is off by {norm:.2g} of its norm, more than {NORM[dtype]}"
    largest = (difference.abs().amax() / truth.abs().amax().clamp(min=1e-300)).item()
    bound = max(LARGEST * torch.finfo(dtype).eps, NORM[dtype] if dtype.itemsize >= 4 else 0)
    assert largest <= bound, f"{name} is off by {largest:.2g} of its largest element, more than {bound:.2g}"
