"""The matching interface that users of Token Merging (ToMe) know, on this library's implementations.

>>> metric = torch.randn(2, 197, 64)
>>> merge, unmerge = bipartite_soft_matching(metric, r=16, class_token=True)
>>> tokens, size = merge_wavg(merge, torch.randn(2, 197, 768))
>>> tokens.shape, unmerge(tokens).shape
(torch.Size([2, 181, 768]), torch.Size([2, 197, 768]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtm_triton.backend import choose_backend
from dtm_triton.groups import (
    MergeMode,
    TokenGroups,
    check_tokens,
    merge_tokens,
    unmerge_tokens,
    weighted_merge_tokens,
)
from dtm_triton.matching import draw_seed, find_groups, most_groups, schedules_tensor
from dtm_triton.schedule import MorphSchedule, as_count


@dataclass(frozen=True, eq=False)
class Merge:
    """Merging by the groups that were found: x [B, N, D] -> [B, G, D].

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> Merge(groups, "portable")(torch.tensor([[[1.], [5.], [3.]]]), mode="sum").tolist()
    [[[4.0], [5.0]]]
    """

    groups: TokenGroups
    backend: str

    def __call__(self, x: Tensor, mode: MergeMode = "mean") -> Tensor:
        return merge_tokens(x, self.groups, mode, backend=self.backend)


@dataclass(frozen=True, eq=False)
class Unmerge:
    """What undoes a `Merge`: x [B, G, D] -> [B, N, D].

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> Unmerge(groups, "portable")(torch.tensor([[[2.], [5.]]])).tolist()
    [[[2.0], [5.0], [2.0]]]
    """

    groups: TokenGroups
    backend: str

    def __call__(self, x: Tensor) -> Tensor:
        return unmerge_tokens(x, self.groups, backend=self.backend)


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    distill_token: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Merge, Unmerge]:
    """One iteration of matching, as functions merge(x [B, N, D], mode="mean") -> [B, N - r, D] and unmerge back.

    metric [B, N, C]: what similarity is measured on. r: tokens to remove, at most half of the unprotected ones.
    class_token protects token 0, distill_token token 1 as well; both then stay in front.
    Raises ValueError when distill_token comes without class_token, else as `match_tokens`. Source: ToMe, section 3.2.

    >>> merge, unmerge = bipartite_soft_matching(torch.tensor([[[1., 0.], [1., 0.], [0., 1.]]]), r=1)
    >>> merge(torch.tensor([[[1.], [3.], [5.]]])).flatten().tolist(), merge.groups.index.tolist()
    ([5.0, 2.0], [[1, 1, 0]])
    """
    check_tokens("metric", metric)
    if distill_token and not class_token:
        raise ValueError(f"distill_token={distill_token} needs class_token=True, got class_token={class_token}")
    protected, schedule = (
        int(class_token) + int(distill_token),
        MorphSchedule((max(as_count("r", r, least=-(2**31)), 0),)),
    )
    backend = choose_backend(backend, metric.device)
    groups = find_groups(
        metric,
        removed=schedules_tensor([schedule]),
        seed=draw_seed("alternating", None),
        num_groups=most_groups(schedule, metric.shape[1], protected, None),
        num_protected=protected,
        random_split=False,
        keep_order=class_token,
        threshold=None,
        backend=backend,
    )
    return Merge(groups, backend), Unmerge(groups, backend)


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The average of merged tokens weighted by how many patches each stands for, and the new sizes [B, G, 1].

    merge: what `bipartite_soft_matching` gave (then x is read once), or any function of its kind.
    x [B, N, D], size [B, N, 1] or None when every token is one patch. Source: ToMe, section 3.3.

    >>> merge, _ = bipartite_soft_matching(torch.ones(1, 3, 2), r=1)
    >>> x, size = merge_wavg(merge, torch.tensor([[[1.], [3.], [5.]]]), torch.tensor([[[3.], [1.], [1.]]]))
    >>> x.flatten().tolist(), size.flatten().tolist()
    ([5.0, 1.5], [1.0, 4.0])
    """
    if isinstance(merge, Merge):
        if size is None:
            return merge(x), merge.groups.size[:, :, None].to(x.dtype)
        return weighted_merge_tokens(x, size, merge.groups, backend=merge.backend)
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Follow which patches every token stands for: 0/1 [B, G, N], from `source` of the layer before.

    >>> merge, _ = bipartite_soft_matching(torch.ones(1, 3, 2), r=1)
    >>> merge_source(merge, torch.ones(1, 3, 4)).int().tolist()
    [[[0, 0, 1], [1, 1, 0]]]
    """
    if source is None:
        source = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")
