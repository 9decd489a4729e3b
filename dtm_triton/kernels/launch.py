"""Everything the library launches, under one name."""

from __future__ import annotations

from dtm_triton.kernels.groups import group_members, merge, morph, unmerge, weighted_merge
from dtm_triton.kernels.loss import loss_backward, loss_forward
from dtm_triton.kernels.match import match

__all__ = ["group_members", "loss_backward", "loss_forward", "match", "merge", "morph", "unmerge", "weighted_merge"]
