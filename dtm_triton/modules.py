"""Morphing and merging as nn.Modules: they hold settings, the functions do the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401  (the examples')
from torch import Tensor, nn

from dtm_triton import ops
from dtm_triton.backend import choose_backend
from dtm_triton.groups import TokenGroups, check_tokens, merge_tokens, morph_tokens
from dtm_triton.matching import Split, check_matching, draw_seed, match_tokens, schedules_tensor
from dtm_triton.schedule import MorphSchedule


class TokenMorph(nn.Module):
    """Replace every token by the mean of its group of similar tokens.

    removed, num_protected and split, and their errors, are those of `match_tokens`; a random split draws from PyTorch's
    default CPU generator. forward(x [B, N, D], features [B, N, C] = x) -> [B, N, D].

    >>> TokenMorph([2])(torch.tensor([[[1.], [2.], [-4.], [-6.]]])).flatten().tolist()
    [1.5, 1.5, -5.0, -5.0]
    """

    def __init__(
        self,
        removed: MorphSchedule | Sequence[int],
        *,
        num_protected: int = 0,
        split: Split = "alternating",
    ) -> None:
        super().__init__()
        check_matching(num_protected, split, None)
        self.schedule = removed if isinstance(removed, MorphSchedule) else MorphSchedule(removed)  # type: ignore[arg-type]
        self.num_protected, self.split = int(num_protected), split

    def match(self, features: Tensor) -> TokenGroups:
        """The groups of features [B, N, C]."""
        return match_tokens(
            features,
            self.schedule,
            num_protected=self.num_protected,
            split=self.split,
        )

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        return morph_tokens(x, self.match(x if features is None else features))

    def extra_repr(self) -> str:
        return f"removed={self.schedule.removed}, num_protected={self.num_protected}, split={self.split!r}"


class TokenMerge(TokenMorph):
    """One mean token per group of similar tokens, and the groups to undo it with `unmerge_tokens`.

    Arguments and errors are those of `TokenMorph`. forward(x [B, N, D], features [B, N, C] = x) -> merged [B, G, D],
    TokenGroups. Without separate features, matching and merging are one kernel launch on a GPU.

    >>> merged, groups = TokenMerge([2])(torch.tensor([[[1.], [2.], [-4.], [-6.]]]))
    >>> merged.flatten().tolist(), groups.index.tolist()
    ([1.5, -5.0], [[0, 0, 1, 1]])
    """

    def forward(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, TokenGroups]:  # type: ignore[override]
        if features is not None:
            groups = self.match(features)
            return merge_tokens(x, groups), groups
        check_tokens("x", x)
        num_groups = self.schedule.num_groups(x.shape[1], self.num_protected)
        merged, index, size = ops.match_merge(
            x,
            schedules_tensor([self.schedule]),
            draw_seed(self.split, None),
            num_groups,
            self.num_protected,
            self.split == "random",
            self.num_protected > 0,
            None,
            choose_backend(None, x.device),
        )
        return merged, TokenGroups(index[0], size[0, :, :num_groups].contiguous())
