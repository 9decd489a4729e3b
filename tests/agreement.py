"""When two implementations may group differently: only where a decision hangs on rounding.

`decision_margins` replays the matching in float64 and returns, per image, how close the closest decision was; images
whose margin exceeds the rounding bound must be grouped alike, to the last index.
"""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

from dtm_triton.kernels.settings import LEAST_THRESHOLD
from dtm_triton.reference import LOWEST, shuffled_slots

ROUNDING = 1e-5
"""More than float32 similarities of up to a few hundred channels can be off by."""


def decision_margins(case: Case) -> Tensor:
    """The smallest gap between a similarity that decided and the one, or the threshold, it was preferred to, [B]."""
    features = case.features.double().cpu()
    return torch.tensor([_margin(case, image, sums.clone()) for image, sums in enumerate(features)]).float()


def _margin(case: Case, image: int, sums: Tensor) -> float:
    protected, keep = case.options["num_protected"], case.options["keep_order"]
    keep = protected > 0 if keep is None else keep
    threshold = case.options.get("threshold")
    seed = int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(case.seed)))
    order, gaps = torch.arange(len(sums)), [torch.inf]
    for iteration, count in enumerate(case.removed):
        groups = len(order)
        count = min(count, (groups - protected) // 2)
        if count <= 0:
            continue
        half = (groups + 1) // 2
        if case.options["split"] == "random":
            slots = shuffled_slots(image + 1, groups, (seed, 0, iteration), protected, "cpu")[image]
        else:
            slots = torch.cat([torch.arange(0, groups, 2), torch.arange(1, groups, 2)])
        a, b = order[slots[:half]], order[slots[half:]]
        norm = sums.norm(dim=-1, keepdim=True)
        unit = (sums / norm).where(norm > 0, 0)
        similarity = (unit[a] @ unit[b].T).nan_to_num(LOWEST)
        similarity[:protected] = -torch.inf
        best, partner = similarity.max(1)
        ranking = best.sort(descending=True, stable=True).indices
        if threshold is not None:
            gaps += (best[ranking[:count]] - threshold).abs().tolist()
            count = min(count, int((best > max(threshold, LEAST_THRESHOLD)).sum()))
            if count == 0:
                continue
        merging, staying = ranking[:count], ranking[count:]
        gaps += (best[merging[-1]] - best[staying[:1]]).tolist()
        for chosen in merging.tolist():
            others = similarity[chosen].clone()
            others[partner[chosen]] = -torch.inf
            gaps.append((best[chosen] - others.max()).item())
        if not keep:
            staying = staying.roll(protected)
            gaps += (best[staying[protected:-1]] - best[staying[protected + 1 :]]).tolist()
        for chosen in merging.tolist():
            sums[b[partner[chosen]]] += sums[a[chosen]].clone()
        order = torch.cat([a[staying.sort().values if keep else staying], b])
    return min(gap for gap in gaps if gap == gap)


def assert_same_groups(actual: Tensor, expected: Tensor, margins: Tensor) -> int:
    """Group indices [B, N] agree in every image decided by more than rounding; returns how many those are."""
    decided = margins > ROUNDING
    wrong = decided & (actual.cpu() != expected.cpu()).any(1)
    assert not wrong.any(), f"images {wrong.nonzero().flatten().tolist()} differ, decided by {margins[wrong].tolist()}"
    return int(decided.sum())
