"""Walking groups, as device functions: tokens sorted by group, and sums and maxima over the members of groups.

members [N] lists the tokens group by group; group g has the size[g] entries from start[g] on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_members(
    index,
    members,
    size,
    first,
    num_tokens,
    num_groups,
    WRITE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Place the tokens first .. first + ROWS by counting those before them; count the groups of those numbers, too."""
    i = first + tl.arange(0, ROWS)
    mine = tl.load(index + i, mask=i < num_tokens, other=0)
    before = tl.zeros((ROWS, COLUMNS), tl.int32)
    equal = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first_j in range(0, num_tokens, COLUMNS):
        j = first_j + tl.arange(0, COLUMNS)
        other = tl.load(index + j, mask=j < num_tokens, other=0)
        earlier = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
        before += (earlier & (j < num_tokens)[None, :]).to(tl.int32)
        if WRITE_SIZE:
            equal += ((other[None, :] == i[:, None]) & (j < num_tokens)[None, :]).to(tl.int32)
    tl.store(members + tl.sum(before, 1), i, mask=i < num_tokens)
    if WRITE_SIZE:
        tl.store(size + i, tl.sum(equal, 1), mask=i < num_groups)


@triton.jit
def group_extent(size, first, num_groups, num_tokens, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the groups first .. first + GROUPS start in the members, and their sizes, at most N."""
    skipped = tl.zeros((BLOCK,), tl.int32)
    for before in range(0, first, BLOCK):
        group = before + tl.arange(0, BLOCK)
        skipped += tl.load(size + group, mask=group < first, other=0)
    group = first + tl.arange(0, GROUPS)
    count = tl.load(size + group, mask=group < num_groups, other=0)
    return tl.sum(skipped, 0) + tl.cumsum(count, 0) - count, tl.minimum(count, num_tokens)


@triton.jit
def member_tokens(members, start, count, first, num_tokens, MEMBERS: tl.constexpr):
    """The tokens [GROUPS, MEMBERS] listed from `first` on in every group, and which of them there are."""
    rank = first + tl.arange(0, MEMBERS)
    place = start[:, None] + rank[None, :]
    listed = (rank[None, :] < count[:, None]) & (place >= 0) & (place < num_tokens)
    token = tl.load(members + place, mask=listed, other=0)
    return token, listed & (token >= 0) & (token < num_tokens)


@triton.jit
def load_tokens(x, token, valid, channel, num_channels, stride_n, stride_c):
    """Rows of x as float32 [GROUPS, MEMBERS, CHANNELS], zero where there is nothing."""
    place = token.to(tl.int64)[:, :, None] * stride_n + (channel.to(tl.int64) * stride_c)[None, None, :]
    inside = valid[:, :, None] & (channel < num_channels)[None, None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def reduce_members(
    x,
    members,
    start,
    count,
    channel,
    num_tokens,
    num_channels,
    stride_n,
    stride_c,
    MODE: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The mean, sum or maximum of every group's members, float32 [GROUPS, CHANNELS]; 0 for an empty group."""
    total = tl.zeros((GROUPS, CHANNELS), tl.float32)
    if MODE == "amax":
        total += float("-inf")
    broken = tl.zeros((GROUPS, CHANNELS), tl.int32)
    for first in range(0, tl.max(count, 0), MEMBERS):
        token, valid = member_tokens(members, start, count, first, num_tokens, MEMBERS)
        value = load_tokens(x, token, valid, channel, num_channels, stride_n, stride_c)
        if MODE == "amax":  # a maximum skips what is not a number, so that is kept apart
            broken += tl.sum((value != value).to(tl.int32), 1)
            value = tl.where(valid[:, :, None] & (value == value), value, float("-inf"))
            total = tl.maximum(total, tl.max(value, 1))
        else:
            total += tl.sum(value, 1)
    if MODE == "mean":
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    if MODE == "amax":
        total = tl.where(broken > 0, float("nan"), tl.where(count[:, None] > 0, total, 0.0))
    return total


@triton.jit
def weigh_members(
    x,
    weight,
    members,
    start,
    count,
    channel,
    num_tokens,
    num_channels,
    stride_n,
    stride_c,
    weight_stride_n,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The weighted mean of every group's members, float32 [GROUPS, CHANNELS], and their total weight [GROUPS]; both 0
    where the weights add up to 0."""
    total = tl.zeros((GROUPS, CHANNELS), tl.float32)
    weights = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, tl.max(count, 0), MEMBERS):
        token, valid = member_tokens(members, start, count, first, num_tokens, MEMBERS)
        share = tl.load(weight + token.to(tl.int64) * weight_stride_n, mask=valid, other=0.0).to(tl.float32)
        value = load_tokens(x, token, valid, channel, num_channels, stride_n, stride_c)
        total += tl.sum(value * share[:, :, None], 1)
        weights += tl.sum(share, 1)
    empty = weights == 0.0
    mean = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, weights)[:, None])
    return mean, weights
