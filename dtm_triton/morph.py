"""Token morphing: what `from dtm_triton import morph` gives.

Groups: `match_tokens`, `TokenGroups`, `MorphSchedule`. On tokens: `merge_tokens`, `weighted_merge_tokens`,
`unmerge_tokens`, `morph_tokens`.
Losses: `morph_loss`, `dtm_loss`. Modules: `TokenMorph`, `TokenMerge`, `DTMLoss`.

>>> tokens = torch.randn(8, 196, 384)
>>> groups = match_tokens(tokens, MorphSchedule.uniform(total=98, iterations=7))
>>> merge_tokens(tokens, groups).shape
torch.Size([8, 98, 384])
"""

import torch  # noqa: F401  (the example's)

from dtm_triton.dtm import DTMLoss
from dtm_triton.groups import TokenGroups, merge_tokens, morph_tokens, unmerge_tokens, weighted_merge_tokens
from dtm_triton.losses import dtm_loss, morph_loss
from dtm_triton.matching import match_tokens
from dtm_triton.modules import TokenMerge, TokenMorph
from dtm_triton.schedule import MorphSchedule

__all__ = [
    "DTMLoss",
    "MorphSchedule",
    "TokenGroups",
    "TokenMerge",
    "TokenMorph",
    "dtm_loss",
    "match_tokens",
    "merge_tokens",
    "morph_loss",
    "morph_tokens",
    "unmerge_tokens",
    "weighted_merge_tokens",
]
