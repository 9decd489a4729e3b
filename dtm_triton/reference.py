"""Every operation stated literally in plain PyTorch: the definition that the fast implementations are tested against.

Written to be read beside the paper, one batched statement a step, on the features themselves and with the dense
source matrix. Works in the input's precision, at least float32. L schedules, B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtm_triton.kernels.settings import LEAST_THRESHOLD
from dtm_triton.rows import add_rows, at_least_float32, gather_rows

LOWEST = -3e38
"""What a similarity that is not a number counts as."""


def match(
    features: Tensor,
    removed: Tensor,
    seed: int,
    *,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group tokens by iterated bipartite matching, once for every schedule. Source: DTM, Algorithm 1.

    features [B, N, C], removed int [L, K] -> index int32 [L, B, N], size int32 [L, B, N] padded with zeros, and members
    int32 [L, B, N]: the tokens sorted by group. Only pairs more similar than `threshold` merge, where there is one.

    >>> index, size, members = match(torch.eye(4)[None, [0, 0, 1, 1]], torch.tensor([[2]]), 0,
    ...                              num_protected=0, random_split=False, keep_order=False)
    >>> index.tolist(), size.tolist()
    ([[[0, 0, 1, 1]]], [[[2, 2, 0, 0]]])
    """
    batch, tokens, _ = features.shape
    index = features.new_zeros((len(removed), batch, tokens), dtype=torch.int32)
    size = torch.zeros_like(index)
    together = max(batch, 1) if threshold is None else 1  # under a threshold images differ in groups
    with torch.autocast(features.device.type, enabled=False):  # half precision would change decisions
        for schedule, counts in enumerate(removed.tolist()):
            for first in range(0, batch, together):
                images, key = slice(first, first + together), (seed, schedule)
                source = _match_images(
                    features[images], first, counts, key, num_protected, random_split, keep_order, threshold
                )
                size[schedule, images, : source.shape[1]] = source.sum(-1)
                if tokens:
                    index[schedule, images] = source.argmax(1).int()
    return index, size, index.sort(dim=-1, stable=True).indices.int()


def _match_images(
    features: Tensor,
    first_image: int,
    removed: list[int],
    key: tuple[int, int],
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
) -> Tensor:
    """One schedule on images that have equally many groups: the dense 0/1 matrix [B, G, N] of tokens in groups."""
    batch, tokens, _ = features.shape
    means = at_least_float32(features)
    source = torch.eye(tokens, device=features.device, dtype=means.dtype).expand(batch, -1, -1)
    for iteration, count in enumerate(removed):
        groups = means.shape[1]
        count = min(count, (groups - num_protected) // 2)
        if count <= 0:
            continue
        slots = torch.arange(groups, device=features.device).expand(batch, -1)
        a, b = slots[:, 0::2], slots[:, 1::2]
        if random_split:
            images = first_image + batch
            shuffled = shuffled_slots(images, groups, (*key, iteration), num_protected, features.device)[first_image:]
            a, b = shuffled[:, : (groups + 1) // 2], shuffled[:, (groups + 1) // 2 :]

        norm = means.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, means / norm, 0 * means)  # the cosine with a zero vector is 0
        similarity = gather_rows(unit, a) @ gather_rows(unit, b).transpose(1, 2)  # [B, A, B]
        similarity = similarity.where(~similarity.isnan(), LOWEST)
        if num_protected >= 1:
            similarity[:, 0, :] = -torch.inf
        if num_protected == 2:
            similarity[:, :, 0] = -torch.inf
        best, partner = similarity.max(-1)
        if threshold is not None:  # there is one image
            count = min(count, int((best > max(threshold, LEAST_THRESHOLD)).sum()))
            if count == 0:
                continue
        ranking = best.sort(dim=-1, descending=True, stable=True).indices
        merging, staying = ranking[:, :count], ranking[:, count:]
        if keep_order:
            staying = staying.sort(-1).values
        elif num_protected:
            staying = staying.roll(1, 1)  # the protected token ranks last, but stays in front
        kept = torch.cat([a.gather(1, staying), b], 1)
        if num_protected == 2:  # both special tokens stay in front
            kept = torch.cat([kept[:, :1], b[:, :1], kept[:, 1 : staying.shape[1]], b[:, 1:]], 1)

        destination = b.gather(1, partner.gather(1, merging))
        into = slots.scatter(1, a.gather(1, merging), destination)  # the slot each slot's tokens move to
        source = gather_rows(add_rows(torch.zeros_like(source), into, source), kept)
        # A sum over members, not a matrix product: one that is not a number must not reach the other groups.
        sums = add_rows(torch.zeros_like(means), source.argmax(1), at_least_float32(features))
        means = sums[:, : kept.shape[1]] / source.sum(-1, keepdim=True)
    return source


def shuffled_slots(batch: int, groups: int, key: tuple[int, int, int], num_protected: int, device: object) -> Tensor:
    """A permutation of the slots per image [B, n] from (seed, schedule, iteration); protected slots come first.

    Counter-based, so that every implementation and every device draws the same: slots sorted by a hash of
    (seed, schedule, image, iteration, slot).

    >>> shuffled_slots(2, 4, (1, 0, 0), 0, "cpu").sort(-1).values.tolist()
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    seed, schedule, iteration = key
    image = torch.arange(batch, device=device)  # type: ignore[call-overload]
    slot = torch.arange(groups, device=device)  # type: ignore[call-overload]
    state = _hash(torch.full_like(image, seed & 0xFFFFFFFF))
    for word in ((seed >> 32) & 0xFFFFFFFF, schedule, image, iteration):
        state = _hash(state ^ word)
    keys = _hash(state[:, None] ^ slot) >> 1
    keys[:, :num_protected] = -1
    return keys.sort(dim=-1, stable=True).indices


def _hash(x: Tensor) -> Tensor:
    """An invertible mixing of 32 bits, in int64 arithmetic."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def merge(x: Tensor, index: Tensor, size: Tensor, mode: str) -> Tensor:
    """The mean, sum or maximum of every group: [B, N, D] -> [B, G, D], 0 for an empty group.

    >>> merge(torch.tensor([[[1.], [3.], [5.]]]), torch.tensor([[0, 0, 1]]), torch.tensor([[2, 1]]), "mean").tolist()
    [[[2.0], [5.0]]]
    """
    if mode == "amax":  # not scatter_reduce: its gradient counts its own initial 0 among the tokens that tie
        member = index[:, None, :] == torch.arange(size.shape[1], device=x.device)[:, None]
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], size.shape[1], x.shape[2])
        largest = torch.where(member[:, :, :, None], x[:, None], -torch.inf).amax(2)
        return torch.where(size[:, :, None] > 0, largest, 0.0)
    rows = at_least_float32(x)
    out = add_rows(rows.new_zeros(x.shape[0], size.shape[1], x.shape[2]), index.long(), rows)
    return (out / size[:, :, None].clamp(min=1) if mode == "mean" else out).to(x.dtype)


def weighted_merge(x: Tensor, weight: Tensor, index: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of every group and its total weight: [B, N, D], [B, N, 1] -> [B, G, D], [B, G, 1].

    0 where the weights add up to 0. Source: ToMe, section 3.3.

    >>> merged, total = weighted_merge(torch.tensor([[[1.], [3.], [5.]]]), torch.tensor([[[3.], [1.], [1.]]]),
    ...                                torch.tensor([[0, 0, 1]]), torch.tensor([[2, 1]]))
    >>> merged.tolist(), total.tolist()
    ([[[1.5], [5.0]]], [[[4.0], [1.0]]])
    """
    weights = at_least_float32(weight)
    weighted = merge(at_least_float32(x) * weights, index, size, "sum")
    total = merge(weights, index, size, "sum")
    merged = torch.where(total == 0, 0.0, weighted / torch.where(total == 0, 1.0, total))
    return merged.to(x.dtype), total.to(weight.dtype)


def unmerge(merged: Tensor, index: Tensor) -> Tensor:
    """Give every token what its group holds: [B, G, D] -> [B, N, D].

    >>> unmerge(torch.tensor([[[2.], [5.]]]), torch.tensor([[0, 0, 1]])).tolist()
    [[[2.0], [2.0], [5.0]]]
    """
    return gather_rows(merged, index.long())


def morph(x: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """Replace every token by its group's mean: [B, N, D] -> [B, N, D]. Source: DTM, equation 3.

    >>> morph(torch.tensor([[[1.], [3.], [5.]]]), torch.tensor([[0, 0, 1]]), torch.tensor([[2, 1]])).tolist()
    [[[2.0], [2.0], [5.0]]]
    """
    return unmerge(merge(at_least_float32(x), index, size, "mean"), index).to(x.dtype)


def loss(
    outputs: Tensor, targets: Tensor, index: Tensor, size: Tensor, *, kind: str, beta: float, normalize_target: bool
) -> Tensor:
    """Token-wise loss between morphed outputs and morphed targets [B, N, C], mean over L schedules and all tokens.

    index [L, B, N], size [L, B, G]. Source: DTM, equations 4 and 5.

    >>> x = torch.ones(1, 2, 3)
    >>> loss(x, 0 * x, torch.zeros(1, 1, 2).int(), torch.full((1, 1, 1), 2), kind="l2", beta=2.0,
    ...      normalize_target=False).item()
    1.0
    """
    outputs, targets = at_least_float32(outputs), at_least_float32(targets)
    total = outputs.new_zeros(())
    for groups, sizes in zip(index, size, strict=True):
        output, target = morph(outputs, groups, sizes), morph(targets, groups, sizes)
        total = total + _token_loss(output, target, kind, beta, normalize_target)
    return (total / max(len(index), 1)).to(outputs.dtype)


def _token_loss(outputs: Tensor, targets: Tensor, kind: str, beta: float, normalize_target: bool) -> Tensor:
    if normalize_target:
        centred = targets - targets.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / max(targets.shape[-1] - 1, 1)
        targets = centred / (variance + 1e-6).sqrt()
    if outputs.numel() == 0:
        return outputs.sum()  # no tokens, no loss
    if kind == "smooth_l1":
        return F.smooth_l1_loss(outputs, targets, beta=beta)
    if kind == "l1":
        return F.l1_loss(outputs, targets)
    if kind == "l2":
        return F.mse_loss(outputs, targets)
    assert kind == "cosine", kind
    lengths = outputs.norm(dim=-1).clamp(min=1e-8) * targets.norm(dim=-1).clamp(min=1e-8)
    return 1 - ((outputs * targets).sum(-1) / lengths).mean()
