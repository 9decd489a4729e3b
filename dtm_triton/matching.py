"""Bipartite soft matching: from features to groups of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
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
    threshold: float | None = None,
    backend: str | None = None,
) -> TokenGroups:
    """Group similar tokens: in every iteration the most similar pairs merge, one token removed by each merge.

    features [B, N, C]: float16, bfloat16, float32 or float64; any strides; squared norms of sums of tokens must be in
    float32's range (where they are not, implementations may part). removed: tokens to remove in each iteration, capped
    at what can merge (half of the unprotected groups).
    num_protected: 1 keeps token 0 (a class token) alone. split: "alternating" slots or a "random" half, drawn anew per
    image and iteration from one number that `generator` (PyTorch's default CPU generator when None) gives.
    keep_order: whether groups that did not merge keep their order or come by falling similarity; by default they keep
    it when a token is protected. threshold: only pairs whose cosine similarity is above it merge, so that removed is
    the most that can go and images differ in groups. An iteration in which nothing merges in an image leaves its
    groups in their order. backend: "reference", "portable", "triton", or None: triton on GPUs that
    can run it, else portable.

    Returns groups in their final order: those that stayed, then those that could receive; with a threshold
    `TokenGroups.size` is [B, N], padded with zeros, and `TokenGroups.count` tells the groups of every image. The cosine
    similarity with a zero vector is 0; one that is not a number counts as lowest. Ties go to the lower slot;
    similarities that differ by rounding only may rank differently from one implementation to another. float64 takes
    the portable path under "triton" too.
    Raises ValueError or TypeError naming the argument and its value. Not differentiable.
    Source: ToMe, section 3.2; DTM, Algorithm 1.

    >>> features = torch.tensor([[[1., 0.], [1., 0.1], [0., 1.], [0.1, 1.]]])
    >>> groups = match_tokens(features, [2])
    >>> groups.index.tolist(), groups.size.tolist()
    ([[0, 0, 1, 1]], [[2, 2]])
    >>> match_tokens(features, [2], threshold=0.999).count
    tensor([4], dtype=torch.int32)
    """
    check_tokens("features", features)
    check_matching(num_protected, split, generator, threshold)
    if keep_order is not None and not isinstance(keep_order, bool):
        raise TypeError(f"keep_order must be a bool or None, got {keep_order!r}")
    schedule = removed if isinstance(removed, MorphSchedule) else MorphSchedule(removed)  # type: ignore[arg-type]
    return find_groups(
        features,
        removed=schedules_tensor([schedule]),
        seed=draw_seed(split, generator),
        num_groups=most_groups(schedule, features.shape[1], num_protected, threshold),
        num_protected=num_protected,
        random_split=split == "random",
        keep_order=num_protected > 0 if keep_order is None else keep_order,
        threshold=None if threshold is None else float(threshold),
        backend=choose_backend(backend, features.device),
    )


def find_groups(
    features: Tensor,
    *,
    removed: Tensor,
    seed: Tensor,
    num_groups: int,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
    backend: str,
) -> TokenGroups:
    """`match_tokens` behind its checks: removed int32 [1, K], seed int64 [1], num_groups columns of sizes.

    >>> find_groups(torch.eye(4)[None, [0, 0, 1, 1]], removed=torch.tensor([[2]]).int(), seed=torch.zeros(1).long(),
    ...             num_groups=2, num_protected=0, random_split=False, keep_order=False, threshold=None,
    ...             backend="portable").index.tolist()
    [[0, 0, 1, 1]]
    """
    features = features.detach()
    if backend == "reference":
        index, size, _ = reference.match(
            features,
            removed,
            int(seed),
            num_protected=num_protected,
            random_split=random_split,
            keep_order=keep_order,
            threshold=threshold,
        )
    else:
        index, size, _ = ops.match(features, removed, seed, num_protected, random_split, keep_order, threshold, backend)
    return TokenGroups(index[0], size[0, :, :num_groups].contiguous())


def match_and_merge(
    x: Tensor,
    *,
    removed: Tensor,
    seed: Tensor,
    num_groups: int,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
    backend: str,
) -> tuple[Tensor, TokenGroups]:
    """`find_groups` on x, and the mean of every group [B, num_groups, C], in one call.

    >>> match_and_merge(torch.eye(4)[None, [0, 0, 1, 1]], removed=torch.tensor([[2]]).int(), seed=torch.zeros(1).long(),
    ...                 num_groups=2, num_protected=0, random_split=False, keep_order=False, threshold=None,
    ...                 backend="portable")[0].tolist()
    [[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]
    """
    merged, index, size = ops.match_merge(
        x, removed, seed, num_groups, num_protected, random_split, keep_order, threshold, backend
    )
    return merged, TokenGroups(index[0], size[0, :, :num_groups].contiguous())


def most_groups(schedule: MorphSchedule, num_tokens: int, num_protected: int, threshold: float | None) -> int:
    """Columns of `TokenGroups.size`: without a threshold exactly the groups that remain, with one all that may.

    >>> most_groups(MorphSchedule((3,)), 8, 0, None), most_groups(MorphSchedule((3,)), 8, 0, 0.5)
    (5, 8)
    """
    return schedule.num_groups(num_tokens, num_protected) if threshold is None else num_tokens


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
    """The number int64 [1] that decides every random split of one call; drawn only when there is one to decide, and
    left on the generator's device, which need not wait for it.

    >>> draw_seed("alternating", None)
    tensor([0])
    """
    if split == "alternating":
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def check_matching(num_protected: object, split: object, generator: object, threshold: object = None) -> None:
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
    if isinstance(threshold, bool) or not (threshold is None or isinstance(threshold, Real)):
        raise TypeError(f"threshold must be a number or None, got {threshold!r}")
    if threshold is not None and not -math.inf < float(threshold) < math.inf:  # not isfinite, which does not compile
        raise ValueError(f"threshold must be finite, got {threshold}")
