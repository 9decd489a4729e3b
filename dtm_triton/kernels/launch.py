"""Everything the library launches, under one name."""

from __future__ import annotations

from dtm_triton.kernels.groups import group_members, merge, morph, unmerge
from dtm_triton.kernels.loss import loss_backward, loss_forward
from dtm_triton.kernels.match import match
from dtm_triton.kernels.settings import MAX_TOKENS

__all__ = ["MAX_TOKENS", "group_members", "loss_backward", "loss_forward", "match", "merge", "morph", "unmerge"]
