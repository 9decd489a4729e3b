"""Bipartite soft matching: from features to groups of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from dtm_triton import ops, reference
from dtm_triton.backend import choose_backend
from dtm_triton.groups import TokenGroups, check_tokens
from dtm_triton.schedule import MorphSchedule, as_count

Split = Literal["alternating", "random"]
SPLITS = ("alternating", "random")


def match_tokens(
    features: Tensor,
    removed: MorphSchedule | Sequence[int],
    *,
    num_protected: int = 0,
    split: Split = "alternating",
    generator: Generator | None = None,
    keep_order: bool | None = None,
    backend: str | None = None,
) -> TokenGroups:
    """Group similar tokens: in every iteration the most similar pairs merge, one token removed by each merge.

    features [B, N, C]: float16, bfloat16, float32 or float64; any strides; squared norms of sums of tokens must be in
    float32's range (where they are not, implementations may part). removed: tokens to remove in each iteration, capped
    at what can merge (half of the unprotected groups).
    num_protected: 1 keeps token 0 (a class token) alone. split: "alternating" slots or a "random" half, drawn anew per
    image and iteration from one number that `generator` (PyTorch's default CPU generator when None) gives.
    keep_order: whether groups that did not merge keep their order or come by falling similarity; by default they keep
    it when a token is protected. backend: "reference", "portable", "triton", or None for the fastest that can run.

    Returns groups in their final order: those that stayed, then those that could receive. The cosine similarity with a
    zero vector is 0; one that is not a number counts as lowest. Ties go to the lower slot; similarities that differ by
    rounding only may rank differently from one implementation to another. More than 256 tokens and
    float64 take the portable path under "triton" too.
    Raises ValueError or TypeError naming the argument and its value. Not differentiable.
    Source: ToMe, section 3.2; DTM, Algorithm 1.

    >>> features = torch.tensor([[[1., 0.], [1., 0.1], [0., 1.], [0.1, 1.]]])
    >>> groups = match_tokens(features, [2])
    >>> groups.index.tolist(), groups.size.tolist()
    ([[0, 0, 1, 1]], [[2, 2]])
    """
    check_tokens("features", features)
    check_matching(num_protected, split, generator)
    if keep_order is not None and not isinstance(keep_order, bool):
        raise TypeError(f"keep_order must be a bool or None, got {keep_order!r}")
    keep_order = num_protected > 0 if keep_order is None else keep_order
    schedule = removed if isinstance(removed, MorphSchedule) else MorphSchedule(removed)  # type: ignore[arg-type]
    num_groups = schedule.num_groups(features.shape[1], num_protected)
    counts = schedules_tensor([schedule])
    seed, backend = draw_seed(split, generator), choose_backend(backend, features.device)
    features, random_split = features.detach(), split == "random"
    if backend == "reference":
        index, size, _ = reference.match(
            features, counts, int(seed), num_protected=num_protected, random_split=random_split, keep_order=keep_order
        )
    else:
        index, size, _ = ops.match(features, counts, seed, num_protected, random_split, keep_order, None, backend)
    return TokenGroups(index[0], size[0, :, :num_groups].contiguous())


def schedules_tensor(schedules: Sequence[MorphSchedule]) -> Tensor:
    """The form in which schedules enter the ops: CPU int32 [L, K], padded with zeros.

    >>> schedules_tensor([MorphSchedule((3, 2)), MorphSchedule((4,))]).tolist()
    [[3, 2], [4, 0]]
    """
    longest = max([0, *[len(schedule.removed) for schedule in schedules]])
    counts = [[min(count, 2**31 - 1) for count in schedule.removed] for schedule in schedules]
    rows = [row + [0] * (longest - len(row)) for row in counts]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(len(schedules), longest)


def draw_seed(split: Split, generator: Generator | None) -> Tensor:
    """The number int64 [1] that decides every random split of one call; drawn only when there is one to decide.

    >>> draw_seed("alternating", None)
    tensor([0])
    """
    if split == "alternating":
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device).cpu()


def check_matching(num_protected: object, split: object, generator: object) -> None:
    """Raise unless the options of matching are valid.

    >>> check_matching(2, "alternating", None)
    Traceback (most recent call last):
    ValueError: num_protected must be 0 or 1, got 2
    """
    if as_count("num_protected", num_protected, least=-(2**31)) not in (0, 1):
        raise ValueError(f"num_protected must be 0 or 1, got {num_protected}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
