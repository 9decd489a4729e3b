"""The operations batched over the Gram matrix in plain PyTorch: for CPUs, and for GPUs without Triton.

Cosine similarities between groups depend only on inner products of group sums, and those are sums of entries of the
Gram matrix of the tokens. So the features are read once, and merging two groups adds their rows and columns.
Half precision is computed in float32. Deterministic on every device. B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels.settings import LEAST_THRESHOLD
from dtm_triton.reference import LOWEST, shuffled_slots, unmerge, weighted_merge
from dtm_triton.rows import add_rows, at_least_float32, gather_rows

__all__ = ["match", "merge", "morph", "unmerge", "weighted_merge"]  # the last two are the reference's

GRAM_BYTES = 64 * 2**20
"""Images are taken in chunks whose Gram matrices fit in here (or one at a time)."""


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
    """Group tokens by iterated bipartite matching; arguments and results are those of `reference.match`."""
    batch, tokens, _ = features.shape
    index = features.new_zeros((len(removed), batch, tokens), dtype=torch.int32)
    counts = removed.tolist()
    chunk = max(1, GRAM_BYTES // (4 * max(tokens, 1) ** 2))
    for first in range(0, batch, chunk):
        images = slice(first, first + chunk)
        _match_images(
            index[:, images],
            features[images],
            first,
            counts,
            seed,
            num_protected,
            random_split,
            keep_order,
            threshold,
        )
    size = torch.zeros_like(index).scatter_add_(-1, index.long(), torch.ones_like(index))
    return index, size, index.sort(dim=-1, stable=True).indices.int()


def _match_images(
    index: Tensor,
    features: Tensor,
    first_image: int,
    removed: list[list[int]],
    seed: int,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
) -> None:
    """Fill index [L, b, N] for the images first_image .. first_image + b - 1."""
    x = at_least_float32(features)
    with torch.autocast(x.device.type, enabled=False):  # a half-precision Gram matrix would change decisions
        gram = x @ x.transpose(1, 2)
    for schedule, counts in enumerate(removed):
        last = schedule == len(removed) - 1
        matching = _Matching(gram if last else gram.clone(), first_image, (seed, schedule), num_protected, threshold)
        for iteration, count in enumerate(counts):
            matching.step(iteration, count, random_split, keep_order)
        index[schedule] = matching.index()


class _Matching:
    """The state of one schedule: `gram` changes in place and is never permuted, `order` [B, n] lists the tokens that
    stand for the groups, `owner` [B, N] is the token that stands for every token's group.

    Under a threshold images differ in groups: `groups` [B, 1] tells how many, n is the most, and behind an image's own
    groups `order` lists tokens that stand for none."""

    def __init__(
        self, gram: Tensor, first_image: int, key: tuple[int, int], num_protected: int, threshold: float | None
    ) -> None:
        batch, tokens, _ = gram.shape
        self.gram, self.first_image, self.key = gram, first_image, key
        self.num_protected, self.threshold = num_protected, threshold
        self.identity = torch.arange(tokens, device=gram.device).expand(batch, -1)
        self.order = self.owner = self.identity
        self.groups = torch.full((batch, 1), tokens, device=gram.device)

    def step(self, iteration: int, count: int, random_split: bool, keep_order: bool) -> None:
        """One iteration: split, choose partners, select at most the `count` best, merge."""
        most = min(count, (self.order.shape[1] - self.num_protected) // 2)
        if most <= 0:
            return
        order = self._shuffled(iteration) if random_split else self.order
        a, b = order[:, 0::2], order[:, 1::2]
        best, partner = self._best_partners(a, b)
        ranking = best.sort(dim=-1, descending=True, stable=True).indices
        merging = ((self.groups - self.num_protected) // 2).clamp(0, count)
        if self.threshold is not None:
            passing = best > max(self.threshold, LEAST_THRESHOLD)
            merging = torch.minimum(merging, passing.sum(1, keepdim=True))
            most = int(merging.max())
        first = ranking[:, :most]
        source, destination = a.gather(1, first), b.gather(1, partner.gather(1, first))
        self._reorder(a, b, ranking, merging, most, keep_order)
        self._merge(source, destination, merging)

    def _shuffled(self, iteration: int) -> Tensor:
        """The order with the first half of its shuffled slots at the even places, the rest at the odd ones."""
        width = self.order.shape[1]
        images = self.first_image + len(self.order)
        slots = shuffled_slots(images, width, (*self.key, iteration), self.num_protected, self.order.device)
        slots = slots[self.first_image :]
        shuffled = self.order.gather(1, _to_the_back(slots, slots >= self.groups))
        rank, half = self.identity[:, :width], (self.groups + 1) // 2
        place = torch.where(rank < half, 2 * rank, 2 * (rank - half) + 1).where(rank < self.groups, rank)
        return torch.zeros_like(shuffled).scatter_(1, place, shuffled)

    def _best_partners(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Each a's highest cosine similarity and the b that has it, the first one on a tie."""
        square = self.gram.diagonal(dim1=1, dim2=2)
        inverse = torch.where(square > 0, square.rsqrt(), 0.0)
        similarity = gather_rows(gather_rows(self.gram, a).transpose(1, 2), b).transpose(1, 2)
        similarity *= inverse.gather(1, b)[:, None, :]
        similarity.nan_to_num_(LOWEST, posinf=torch.inf, neginf=LOWEST)
        if self.num_protected == 2:
            similarity[:, :, 0] = -torch.inf
        if self.threshold is not None:
            similarity.masked_fill_((self.identity[:, : b.shape[1]] >= self.groups // 2)[:, None, :], -torch.inf)
        best, partner = similarity.max(-1)
        # a's own norm scales its whole row alike, so it comes last: the kernels decide by the same arithmetic.
        best = torch.where(best > LOWEST, best * inverse.gather(1, a), LOWEST)
        best = torch.where(best > LOWEST, best, LOWEST)
        if self.num_protected:
            best[:, 0] = -torch.inf
        if self.threshold is not None:
            best.masked_fill_(self.identity[:, : a.shape[1]] >= (self.groups + 1) // 2, -torch.inf)
        return best, partner

    def _reorder(self, a: Tensor, b: Tensor, ranking: Tensor, merging: Tensor, most: int, keep_order: bool) -> None:
        """The order after the first `merging` (at most `most`) of the ranking have left: a's tokens, then b's."""
        width, slot = self.order.shape[1], self.identity[:, : a.shape[1]]
        rank = torch.zeros_like(ranking).scatter_(1, ranking, slot)
        gone = (rank < merging) | (slot >= (self.groups + 1) // 2)
        if not keep_order:
            if self.num_protected:
                ranking = _to_the_back(ranking, ranking > 0)  # the protected token stays in front
            a, gone = a.gather(1, ranking), gone.gather(1, ranking)
        gone_b = self.identity[:, : b.shape[1]] >= self.groups // 2
        order = _to_the_back(self._joined(a, b), self._joined(gone, gone_b)).where(merging > 0, self.order)
        self.groups = self.groups - merging
        self.order = order[:, : width - most if self.threshold is None else int(self.groups.max())]

    def _joined(self, a: Tensor, b: Tensor) -> Tensor:
        """What belongs to the slots of a, then of b; two special tokens both stay in front."""
        return torch.cat([a[:, :1], b[:, :1], a[:, 1:], b[:, 1:]] if self.num_protected == 2 else [a, b], 1)

    def _merge(self, source: Tensor, destination: Tensor, merging: Tensor) -> None:
        """Add the first `merging` sources' rows and columns to their destinations'."""
        real = self.identity[:, : source.shape[1]] < merging
        destination = destination.where(real, source)
        for matrix in (self.gram, self.gram.transpose(1, 2)):
            rows = gather_rows(matrix, source)
            if self.threshold is not None:
                rows.masked_fill_(~real[:, :, None], 0.0)
            add_rows(matrix, destination, rows)
        self.owner = self.identity.scatter(1, source, destination).gather(1, self.owner)

    def index(self) -> Tensor:
        """The position of every token's group in the final order [B, N]."""
        positions = self.identity[:, : self.order.shape[1]]
        return torch.zeros_like(self.identity).scatter_(1, self.order, positions).gather(1, self.owner).int()


def _to_the_back(values: Tensor, back: Tensor) -> Tensor:
    """The values [B, n] whose `back` is true behind the others, either in the order they had."""
    return values.gather(1, back.sort(dim=1, stable=True).indices)


def merge(x: Tensor, index: Tensor, size: Tensor, mode: str) -> Tensor:
    """The mean, sum or maximum of every group: [B, N, D] -> [B, G, D], 0 for an empty group."""
    if mode != "amax":
        return reference.merge(x, index, size, mode)
    where = index.long()[:, :, None].expand_as(x)
    merged = x.new_zeros(x.shape[0], size.shape[1], x.shape[2])
    return merged.scatter_reduce_(1, where, x, "amax", include_self=False)


def morph(x: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """Replace every token by its group's mean: [B, N, D] -> [B, N, D]."""
    return unmerge(merge(x, index, size, "mean"), index)
