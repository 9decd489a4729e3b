"""When two implementations may group differently: only where a decision hangs on rounding.

`decision_margins` replays the matching in float64 and returns, per image, how close the closest decision was; images
whose margin exceeds the rounding bound must be grouped alike, to the last index.
"""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

from dtm_triton.reference import LOWEST, shuffled_slots

ROUNDING = 1e-5
"""More than float32 similarities of up to a few hundred channels can be off by."""


def decision_margins(case: Case) -> Tensor:
    """The smallest gap between a similarity that decided and the one it was preferred to, [B]."""
    x = case.features.double().cpu()
    batch, tokens, _ = x.shape
    protected, keep = case.options["num_protected"], case.options["keep_order"]
    keep = protected > 0 if keep is None else keep
    seed = int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(case.seed)))
    sums, margins = x.clone(), torch.full((batch,), torch.inf)
    order = torch.arange(tokens).repeat(batch, 1)
    for iteration, count in enumerate(case.removed):
        groups = order.shape[1]
        count = min(count, (groups - protected) // 2)
        if count <= 0:
            continue
        slots = torch.arange(groups).repeat(batch, 1)
        half = (groups + 1) // 2
        if case.options["split"] == "random":
            slots = shuffled_slots(batch, groups, (seed, 0, iteration), protected, "cpu")
        else:
            slots = torch.cat([slots[:, 0::2], slots[:, 1::2]], 1)
        placed = order.gather(1, slots)
        new_order = []
        for image in range(batch):
            a, b = placed[image, :half], placed[image, half:]
            vectors = sums[image]
            unit = vectors / vectors.norm(dim=-1, keepdim=True)
            unit = unit.where(vectors.norm(dim=-1, keepdim=True) > 0, 0)
            similarity = (unit[a] @ unit[b].T).nan_to_num(LOWEST)
            similarity[:protected] = -torch.inf
            best, partner = similarity.max(1)
            ranking = best.sort(descending=True, stable=True).indices
            merging, staying = ranking[:count], ranking[count:]
            gaps = [(best[merging[-1]] - best[s]).item() for s in staying[:1]]
            for chosen in merging.tolist():
                others = similarity[chosen].clone()
                others[partner[chosen]] = -torch.inf
                gaps.append((best[chosen] - others.max()).item())
            if not keep:
                staying = staying.roll(protected)
                gaps += (best[staying[protected:-1]] - best[staying[protected + 1 :]]).tolist()
            margins[image] = min(margins[image].item(), *(gap for gap in gaps if gap == gap), torch.inf)
            for chosen in merging.tolist():
                sums[image, b[partner[chosen]]] += sums[image, a[chosen]].clone()
            new_order.append(torch.cat([a[staying.sort().values if keep else staying], b]))
        order = torch.stack(new_order)
    return margins


def assert_same_groups(actual: Tensor, expected: Tensor, margins: Tensor) -> int:
    """Group indices [B, N] agree in every image decided by more than rounding; returns how many those are."""
    decided = margins > ROUNDING
    wrong = decided & (actual.cpu() != expected.cpu()).any(1)
    assert not wrong.any(), f"images {wrong.nonzero().flatten().tolist()} differ, decided by {margins[wrong].tolist()}"
    return int(decided.sum())
