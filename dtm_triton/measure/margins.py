"""How close the closest decision of a matching was: where it hangs on rounding, implementations may group differently.

B images, N tokens, C channels, n groups left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 5e-6
"""More than similarities computed in float32, or on matrix units that accumulate in it, are off by."""


def decision_margins(
    features: Tensor, removed: Sequence[int], num_protected: int, keep_order: bool
) -> tuple[Tensor, Tensor]:
    """Replay a matching in float64: its groups [B, N], and per image the least gap that decided [B].

    features [B, N, C]. A decision is which partner a merging token chose, who was the last to merge, and, without
    keep_order, in what order those that did not merge come.

    >>> groups, margins = decision_margins(torch.tensor([[[1., 0.], [1., 0.], [0.6, 0.8], [0., 1.]]]), [1], 0, False)
    >>> groups.tolist(), round(margins.item(), 2)
    ([[1, 1, 0, 2]], 0.2)
    """
    sums = features.double()
    batch, tokens, _ = features.shape
    group = torch.arange(tokens, device=features.device).repeat(batch, 1)
    margins = sums.new_full((batch,), torch.inf)
    for count in removed:
        groups = sums.shape[1]
        if (count := min(count, (groups - num_protected) // 2)) <= 0:
            continue
        unit = sums / sums.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        similarity = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
        if num_protected:
            similarity[:, 0] = -torch.inf
        best, partner = similarity.max(-1)
        ranked, ranking = best.sort(dim=-1, descending=True, stable=True)
        merging, staying = ranking[:, :count], ranking[:, count:]
        into = partner.gather(1, merging)

        if similarity.shape[2] > 1:
            two = similarity.topk(2, dim=-1).values
            margins = torch.minimum(margins, (two[..., 0] - two[..., 1]).gather(1, merging).amin(1))
        gaps = ranked[:, :-1] - ranked[:, 1:]
        deciding = gaps[:, count - 1 : count if keep_order else None]
        if deciding.shape[1]:
            margins = torch.minimum(margins, deciding.amin(1))

        if keep_order:
            staying = staying.sort(-1).values
        kept = staying.shape[1]
        position = torch.empty_like(group[:, :groups])
        position[:, 1::2] = kept + torch.arange(groups // 2, device=features.device)
        position[:, 0::2] = position[:, 0::2].scatter(
            1, staying, torch.arange(kept, device=features.device).expand_as(staying)
        )
        position[:, 0::2] = position[:, 0::2].scatter(1, merging, kept + into)
        group = position.gather(1, group)
        sums = torch.zeros_like(sums[:, count:]).scatter_add(1, position[:, :, None].expand_as(sums), sums)
    return group, margins
