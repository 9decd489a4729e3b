"""Morphing and merging as nn.Modules: they hold settings, the functions do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch  # noqa: F401  (the examples')
from torch import Tensor, nn

from dtm_triton.backend import choose_backend
from dtm_triton.groups import TokenGroups, check_tokens, merge_tokens, morph_tokens
from dtm_triton.matching import (
    Split,
    check_matching,
    draw_seed,
    find_groups,
    match_and_merge,
    most_groups,
    schedules_tensor,
)
from dtm_triton.schedule import MorphSchedule


class TokenMorph(nn.Module):
    """Replace every token by the mean of its group of similar tokens.

    removed, num_protected, split and threshold, and their errors, are those of `match_tokens`; a random split draws
    from PyTorch's default CPU generator. forward(x [B, N, D], features [B, N, C] = x) -> [B, N, D]. On the device of x
    (`.to(device)`) the module copies nothing from the host, unless it splits at random, and CUDA graphs can capture it.

    >>> TokenMorph([2])(torch.tensor([[[1.], [2.], [-4.], [-6.]]])).flatten().tolist()
    [1.5, 1.5, -5.0, -5.0]
    """

    removed: Tensor

    def __init__(
        self,
        removed: MorphSchedule | Sequence[int],
        *,
        num_protected: int = 0,
        split: Split = "alternating",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        check_matching(num_protected, split, None, threshold)
        self.schedule = removed if isinstance(removed, MorphSchedule) else MorphSchedule(removed)  # type: ignore[arg-type]
        self.num_protected, self.split = int(num_protected), split
        self.threshold = None if threshold is None else float(threshold)
        self.register_buffer("removed", schedules_tensor([self.schedule]), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenMorph:
        super()._apply(fn, recurse)
        # Written anew: to_empty() leaves anything in buffers.
        self.removed = schedules_tensor([self.schedule]).to(self.removed.device)
        return self

    def match(self, features: Tensor) -> TokenGroups:
        """The groups of features [B, N, C]."""
        check_tokens("features", features)
        return find_groups(features, **self._options(features))

    def _options(self, features: Tensor) -> dict[str, Any]:
        return dict(
            removed=self.removed,
            seed=draw_seed(self.split, None),
            num_groups=most_groups(self.schedule, features.shape[1], self.num_protected, self.threshold),
            num_protected=self.num_protected,
            random_split=self.split == "random",
            keep_order=self.num_protected > 0,
            threshold=self.threshold,
            backend=choose_backend(None, features.device),
        )

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        return morph_tokens(x, self.match(x if features is None else features))

    def extra_repr(self) -> str:
        options = f"num_protected={self.num_protected}, split={self.split!r}, threshold={self.threshold}"
        return f"removed={self.schedule.removed}, {options}"


class TokenMerge(TokenMorph):
    """One mean token per group of similar tokens, and the groups to undo it with `unmerge_tokens`.

    Arguments and errors are those of `TokenMorph`. forward(x [B, N, D], features [B, N, C] = x) -> merged [B, G, D],
    TokenGroups; G is N with a threshold, and rows past an image's last group are 0. Without separate features, matching
    and merging are one call.

    >>> merged, groups = TokenMerge([2])(torch.tensor([[[1.], [2.], [-4.], [-6.]]]))
    >>> merged.flatten().tolist(), groups.index.tolist()
    ([1.5, -5.0], [[0, 0, 1, 1]])
    """

    def forward(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, TokenGroups]:  # type: ignore[override]
        if features is not None:
            groups = self.match(features)
            return merge_tokens(x, groups), groups
        check_tokens("x", x)
        return match_and_merge(x, **self._options(x))
