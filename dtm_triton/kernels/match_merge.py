"""Merging on the Gram matrix, as device functions of `match_kernel`: rows are added, then columns.

The r merging tokens are listed by rank: source[q] merges into destination[q]. Sources of one destination form a linked
list, headed by the first of them, so that each destination's new row is summed in a fixed order by one owner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.match_steps import FAR, inverse_root


@triton.jit
def link_sources(destination, successor, length, r, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr):
    """successor[q]: the next source with q's destination, or -1. length[q]: of the list that q heads, else 0."""
    for first in range(0, r, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        mine = tl.load(destination + q, mask=q < r, other=-2)
        after = tl.full((BLOCK_Q, BLOCK_E), FAR, tl.int32)
        before = tl.zeros((BLOCK_Q, BLOCK_E), tl.int32)
        equal = tl.zeros((BLOCK_Q, BLOCK_E), tl.int32)
        for first_e in range(0, r, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            same = mine[:, None] == tl.load(destination + e, mask=e < r, other=-1)[None, :]
            later = e[None, :] > q[:, None]
            after = tl.minimum(after, tl.where(same & later, e[None, :], FAR))
            before += (same & (e[None, :] < q[:, None])).to(tl.int32)
            equal += same.to(tl.int32)
        following = tl.min(after, 1)
        heads = tl.sum(before, 1) == 0
        tl.store(successor + q, tl.where(following < FAR, following, -1), mask=q < r)
        tl.store(length + q, tl.where(heads, tl.sum(equal, 1), 0), mask=q < r)


@triton.jit
def add_rows(
    gram,
    source,
    destination,
    successor,
    length,
    touched,
    stamp,
    r,
    num_tokens,
    stride,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the sources' rows to their destination's, and copy the sum to its column in every row that is not merging."""
    for first in range(0, r, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        count = tl.load(length + q, mask=q < r, other=0)
        owns = count > 0
        target = tl.load(destination + q, mask=owns, other=0)
        longest = tl.max(count, 0)
        for first_column in range(0, num_tokens, BLOCK_N):
            column = first_column + tl.arange(0, BLOCK_N)
            inside = owns[:, None] & (column < num_tokens)[None, :]
            total = tl.load(gram + ((target * stride)[:, None] + column[None, :]), mask=inside, other=0.0)
            link = tl.where(owns, q, -1)
            for _ in range(longest):
                linked = link >= 0
                row = tl.load(source + link, mask=linked, other=0)
                place = (row * stride)[:, None] + column[None, :]
                total += tl.load(gram + place, mask=inside & linked[:, None], other=0.0)
                link = tl.load(successor + link, mask=linked, other=-1)
            tl.store(gram + ((target * stride)[:, None] + column[None, :]), total, mask=inside)
            # Rows of sources are still being read and rows of destinations written by their owners.
            still = tl.load(touched + column, mask=column < num_tokens, other=0) != stamp
            tl.store(gram + ((column * stride)[None, :] + target[:, None]), total, mask=inside & still[None, :])


@triton.jit
def add_columns(
    gram,
    inverse_norm,
    source,
    destination,
    successor,
    length,
    r,
    stride,
    BLOCK_Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add the sources' columns to their destination's where two destinations meet; the diagonal gives the new norms."""
    for first in range(0, r, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        owns = tl.load(length + q, mask=q < r, other=0) > 0
        row = tl.load(destination + q, mask=owns, other=0) * stride
        for first_e in range(0, r, BLOCK_E):
            e = first_e + tl.arange(0, BLOCK_E)
            count = tl.load(length + e, mask=e < r, other=0)
            meets = owns[:, None] & (count > 0)[None, :]
            target = tl.load(destination + e, mask=count > 0, other=0)
            total = tl.load(gram + (row[:, None] + target[None, :]), mask=meets, other=0.0)
            link = tl.where(count > 0, e, -1)
            for _ in range(tl.max(count, 0)):
                linked = link >= 0
                column = tl.load(source + link, mask=linked, other=0)
                total += tl.load(gram + (row[:, None] + column[None, :]), mask=meets & linked[None, :], other=0.0)
                link = tl.load(successor + link, mask=linked, other=-1)
            tl.store(gram + (row[:, None] + target[None, :]), total, mask=meets)
            diagonal = meets & (q[:, None] == e[None, :])
            tl.store(inverse_norm + target[None, :] + 0 * row[:, None], inverse_root(total), mask=diagonal)
