"""The operations batched over the Gram matrix in plain PyTorch: for CPUs, and for GPUs without Triton.

Cosine similarities between groups depend only on inner products of group sums, and those are sums of entries of the
Gram matrix of the tokens. So the features are read once, and merging two groups adds their rows and columns.
Half precision is computed in float32. Deterministic on every device. B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtm_triton.reference import LOWEST, shuffled_slots
from dtm_triton.rows import add_rows, at_least_float32, gather_rows

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
    chunk = max(1, GRAM_BYTES // (4 * max(tokens, 1) ** 2))
    for first in range(0, batch, chunk):
        images = slice(first, first + chunk)
        _match_images(
            index[:, images], features[images], first, removed.tolist(), seed, num_protected, random_split, keep_order
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
) -> None:
    """Fill index [L, b, N] for the images first_image .. first_image + b - 1."""
    x = at_least_float32(features)
    with torch.autocast(x.device.type, enabled=False):  # a half-precision Gram matrix would change decisions
        gram = x @ x.transpose(1, 2)
    for schedule, counts in enumerate(removed):
        last = schedule == len(removed) - 1
        matching = _Matching(gram if last else gram.clone(), (seed, schedule), first_image, num_protected)
        for iteration, count in enumerate(counts):
            matching.step(iteration, count, random_split, keep_order)
        index[schedule] = matching.groups()


class _Matching:
    """The state of one schedule: `gram` changes in place and is never permuted, `order` [B, n] lists the tokens that
    stand for the groups, `owner` [B, N] is the token that stands for every token's group."""

    def __init__(self, gram: Tensor, key: tuple[int, int], first_image: int, num_protected: int) -> None:
        batch, tokens, _ = gram.shape
        self.gram, self.key, self.first_image, self.num_protected = gram, key, first_image, num_protected
        self.identity = torch.arange(tokens, device=gram.device).expand(batch, -1)
        self.order = self.owner = self.identity

    def step(self, iteration: int, count: int, random_split: bool, keep_order: bool) -> None:
        """One iteration: split, choose partners, select the `count` best, merge."""
        groups, protected = self.order.shape[1], self.num_protected
        count = min(count, (groups - protected) // 2)
        if count <= 0:
            return
        if random_split:
            images = self.first_image + len(self.order)
            slots = shuffled_slots(images, groups, (*self.key, iteration), protected, self.order.device)
            shuffled = self.order.gather(1, slots[self.first_image :])
            a, b = shuffled[:, : (groups + 1) // 2], shuffled[:, (groups + 1) // 2 :]
        else:
            a, b = self.order[:, 0::2], self.order[:, 1::2]
        best, partner = self._best_partners(a, b)
        ranking = best.sort(dim=-1, descending=True, stable=True).indices
        staying = ranking[:, count:]
        if keep_order:
            staying = staying.sort(-1).values
        elif protected:
            staying = staying.roll(1, 1)  # the protected token ranks last, but stays in front
        merging = ranking[:, :count]
        kept = a.gather(1, staying)
        if protected == 2:  # both special tokens stay in front
            self.order = torch.cat([kept[:, :1], b[:, :1], kept[:, 1:], b[:, 1:]], 1)
        else:
            self.order = torch.cat([kept, b], 1)
        self._merge(a.gather(1, merging), b.gather(1, partner.gather(1, merging)))

    def _best_partners(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Each a's highest cosine similarity and the b that has it, the first one on a tie."""
        square = self.gram.diagonal(dim1=1, dim2=2)
        inverse = torch.where(square > 0, square.rsqrt(), 0.0)
        similarity = gather_rows(self.gram, a).gather(2, b[:, None, :].expand(-1, a.shape[1], -1))
        similarity *= inverse.gather(1, b)[:, None, :]
        similarity *= inverse.gather(1, a)[:, :, None]
        similarity.masked_fill_(similarity.isnan(), LOWEST)
        if self.num_protected >= 1:
            similarity[:, 0, :] = -torch.inf
        if self.num_protected == 2:
            similarity[:, :, 0] = -torch.inf
        best, partner = similarity.max(-1)
        return best, partner

    def _merge(self, source: Tensor, destination: Tensor) -> None:
        """Add the sources' rows and columns to their destinations'."""
        add_rows(self.gram, destination, gather_rows(self.gram, source))
        columns = self.gram.transpose(1, 2)
        add_rows(columns, destination, gather_rows(columns, source))
        self.owner = self.identity.scatter(1, source, destination).gather(1, self.owner)

    def groups(self) -> Tensor:
        """The position of every token's group in the final order [B, N]."""
        positions = self.identity[:, : self.order.shape[1]]
        return torch.zeros_like(self.identity).scatter_(1, self.order, positions).gather(1, self.owner).int()


def merge(x: Tensor, index: Tensor, size: Tensor, mode: str) -> Tensor:
    """The mean, sum or maximum of every group: [B, N, D] -> [B, G, D]."""
    shape = (x.shape[0], size.shape[1], x.shape[2])
    if mode == "amax":
        where = index.long()[:, :, None].expand_as(x)
        return x.new_zeros(shape).scatter_reduce_(1, where, x, "amax", include_self=False)
    rows = at_least_float32(x)
    merged = add_rows(rows.new_zeros(shape), index.long(), rows)
    return (merged / size[:, :, None] if mode == "mean" else merged).to(x.dtype)


def unmerge(merged: Tensor, index: Tensor) -> Tensor:
    """Give every token what its group holds: [B, G, D] -> [B, N, D]."""
    return gather_rows(merged, index.long())


def morph(x: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """Replace every token by its group's mean: [B, N, D] -> [B, N, D]."""
    return unmerge(merge(x, index, size, "mean"), index)
