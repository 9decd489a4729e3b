"""Token-wise losses between morphed features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Generator, Tensor

from dtm_triton import loss_ops, reference
from dtm_triton.backend import choose_backend
from dtm_triton.groups import TokenGroups, check_groups, check_tokens
from dtm_triton.matching import Split, check_matching, draw_seed, schedules_tensor
from dtm_triton.schedule import MorphSchedule

LossKind = Literal["smooth_l1", "l1", "l2", "cosine"]
LOSS_KINDS = ("smooth_l1", "l1", "l2", "cosine")


def morph_loss(
    outputs: Tensor,
    targets: Tensor,
    groups: TokenGroups,
    kind: LossKind = "smooth_l1",
    beta: float = 2.0,
    normalize_target: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """The token-wise loss between morphed outputs and morphed targets, mean over all tokens (and channels).

    outputs and targets [B, N, C], floating point, of one shape and device; dtypes and strides may differ. kind:
    "smooth_l1" (quadratic below `beta`), "l1", "l2" (squared) or "cosine" (1 - cosine similarity of each token).
    normalize_target: standardise each morphed target token over its channels (unbiased variance, eps 1e-6).

    Returns a float32 scalar (float64 for float64 outputs), 0 when there are no tokens. Differentiable once, in
    reverse mode, in `outputs` only: the gradient needs no matching and no merging, as morphing projects symmetrically.
    Raises ValueError or TypeError naming the argument and its value. Source: DTM, equations 4 and 5.

    >>> groups = TokenGroups(torch.tensor([[0, 0, 1]]).int(), torch.tensor([[2, 1]]).int())
    >>> outputs = torch.tensor([[[0.], [4.], [3.]]], requires_grad=True)
    >>> loss = morph_loss(outputs, torch.zeros(1, 3, 1), groups, kind="l2")  # morphed outputs: 2, 2, 3
    >>> loss.backward()
    >>> round(loss.item(), 3), [round(slope, 3) for slope in outputs.grad.flatten().tolist()]
    (5.667, [1.333, 1.333, 2.0])
    """
    check_pair(outputs, targets)
    check_groups(groups, "outputs", outputs, groups_of_tokens=True)
    check_loss(kind, beta, normalize_target)
    index, size = groups.index[None], groups.size[None]
    if (backend := choose_backend(backend, outputs.device)) == "reference":
        options = dict(kind=kind, beta=beta, normalize_target=normalize_target)
        return reference.loss(outputs, targets.detach(), index, size, **options)  # type: ignore[arg-type]
    save = torch.is_grad_enabled() and outputs.requires_grad
    loss, _ = loss_ops.morph_loss(
        outputs, targets.detach(), index, size, None, kind, float(beta), normalize_target, save, backend
    )
    return loss


def dtm_loss(
    outputs: Tensor,
    targets: Tensor,
    schedules: MorphSchedule | Sequence[MorphSchedule] | Tensor,
    *,
    kind: LossKind = "smooth_l1",
    beta: float = 2.0,
    normalize_target: bool = False,
    num_protected: int = 0,
    split: Split = "alternating",
    generator: Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dynamic Token Morphing: match the targets' tokens, then `morph_loss`, averaged over schedules.

    outputs (student) and targets (teacher) [B, N, C]. schedules: one, several, or an int32 tensor [L, K] of tokens to
    remove, each row padded with zeros; in that last form torch.compile does not compile again when the schedules
    change, and a captured CUDA graph reads them anew in every replay when the tensor is on the outputs' device (there
    its values are not checked: what is negative removes nothing). With the random split a graph needs a CUDA generator.
    Other arguments and errors as in `match_tokens` and `morph_loss`.

    Returns a scalar, differentiable once, in reverse mode, in `outputs` only.
    Source: DTM, Algorithm 1, equations 4 and 5.

    >>> generator = torch.Generator().manual_seed(0)
    >>> targets = torch.randn(2, 16, 8, generator=generator)
    >>> dtm_loss(targets, targets, [MorphSchedule((4, 4)), MorphSchedule((3,))]).item()
    0.0
    """
    check_pair(outputs, targets)
    check_loss(kind, beta, normalize_target)
    check_matching(num_protected, split, generator)
    removed = check_schedules(schedules, outputs.device)
    seed, backend = draw_seed(split, generator), choose_backend(backend, outputs.device)
    return matched_loss(
        outputs,
        targets,
        removed,
        seed,
        kind=kind,
        beta=float(beta),
        normalize_target=normalize_target,
        num_protected=num_protected,
        split=split,
        backend=backend,
    )


def matched_loss(
    outputs: Tensor,
    targets: Tensor,
    removed: Tensor,
    seed: Tensor,
    *,
    kind: str,
    beta: float,
    normalize_target: bool,
    num_protected: int,
    split: str,
    backend: str,
) -> Tensor:
    """`dtm_loss` behind its checks: removed int32 [L, K] and seed int64 [1], on the CPU or beside them.

    >>> x = torch.eye(4)[None]
    >>> matched_loss(x, x, torch.tensor([[1]]).int(), torch.zeros(1).long(), kind="l2", beta=1.0,
    ...              normalize_target=False, num_protected=0, split="alternating", backend="portable").item()
    0.0
    """
    targets, random_split = targets.detach(), split == "random"
    if backend == "reference":
        index, size, _ = reference.match(
            targets,
            removed,
            int(seed),
            num_protected=num_protected,
            random_split=random_split,
            keep_order=num_protected > 0,
        )
        return reference.loss(outputs, targets, index, size, kind=kind, beta=beta, normalize_target=normalize_target)
    save = torch.is_grad_enabled() and outputs.requires_grad
    loss, _ = loss_ops.dtm_loss(
        outputs, targets, removed, seed, num_protected, random_split, kind, beta, normalize_target, save, backend
    )
    return loss


def check_schedules(schedules: object, device: torch.device) -> Tensor:
    """Schedules in any accepted form as int32 [L, K], L at least 1, on the CPU or on `device`.

    >>> check_schedules(MorphSchedule((3, 2)), torch.device("cpu")).tolist()
    [[3, 2]]
    """
    if isinstance(schedules, Tensor):
        on_cpu = schedules.device.type == "cpu"
        if schedules.dtype != torch.int32 or schedules.ndim != 2 or not (on_cpu or schedules.device == device):
            raise ValueError(
                f"schedules as a tensor must be int32 [L, K] on the CPU or on {device}, "
                f"got {schedules.dtype} {list(schedules.shape)} on {schedules.device}"
            )
        if on_cpu and not torch.compiler.is_compiling() and bool((schedules < 0).any()):
            raise ValueError(f"schedules must not be negative, got {schedules.tolist()}")
        removed = schedules
    else:
        rows = [schedules] if isinstance(schedules, MorphSchedule) else schedules
        if not isinstance(rows, Sequence) or not all(isinstance(row, MorphSchedule) for row in rows):
            raise TypeError(f"schedules must be MorphSchedules or an int32 tensor, got {schedules!r:.80}")
        removed = schedules_tensor(rows)
    if removed.shape[0] == 0:
        raise ValueError("schedules must hold at least one schedule, got none")
    return removed


def check_pair(outputs: object, targets: object) -> None:
    """Raise unless outputs and targets are token tensors of one shape on one device.

    >>> check_pair(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
    Traceback (most recent call last):
    ValueError: targets must have the shape of outputs [1, 2, 3], got [1, 2, 4]
    """
    check_tokens("outputs", outputs)
    check_tokens("targets", targets)
    assert isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if targets.shape != outputs.shape:
        raise ValueError(f"targets must have the shape of outputs {list(outputs.shape)}, got {list(targets.shape)}")
    if targets.device != outputs.device:
        raise ValueError(f"targets must be on the device of outputs {outputs.device}, got {targets.device}")


def check_loss(kind: object, beta: object, normalize_target: object) -> None:
    """Raise unless the options of the loss are valid.

    >>> check_loss("huber", 2.0, False)
    Traceback (most recent call last):
    ValueError: kind must be one of ('smooth_l1', 'l1', 'l2', 'cosine'), got 'huber'
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"kind must be one of {LOSS_KINDS}, got {kind!r}")
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"beta must be a number, got {beta!r}")
    if not 0 <= float(beta) < math.inf:  # not isfinite, which does not compile
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    if not isinstance(normalize_target, bool):
        raise TypeError(f"normalize_target must be a bool, got {normalize_target!r}")
