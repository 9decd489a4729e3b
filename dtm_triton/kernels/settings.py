"""How the kernels are launched: tile sizes and warps as plain data, chosen by shape and dtype alone.

Nothing here asks the device. The numbers are the ones that compile without spilling for every target in
tests/kernels/resources.json; tests swap the functions below for ones that return tiny tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_TOKENS = 256
"""More tokens than this do not fit the matching kernel's slots."""

MAX_COUNTED_TOKENS = 1024
"""Up to here the tokens are sorted by group by counting, which takes N^2 comparisons."""

EXTENT_BLOCK = 256
"""Group sizes that a program adds at a time to find where its own groups start."""


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """Tiles of the matching kernel."""

    slots: int
    """Tokens rounded up to a power of two: the length of every per-token list."""
    gram_rows: int
    """Rows and columns of a tile of the Gram matrix."""
    gram_channels: int
    """Channels that one step of the Gram matrix product takes."""
    match_rows: int = 64
    """A-slots that look for their partner together."""
    match_columns: int = 32
    """B-slots that a step of that search takes."""
    rank_columns: int = 32
    """Keys that one step of ranking by counting takes."""
    link_rows: int = 16
    """Merging tokens whose successor in the list is looked for together."""
    merge_rows: int = 8
    """Destinations whose rows are added together."""
    merge_columns: int = 128
    """Columns of the Gram matrix that one step of adding rows takes."""
    block_columns: int = 32
    """Destinations that one step of adding columns takes."""
    mean_groups: int = 16
    """Groups whose mean is formed together."""
    mean_channels: int = 128
    """Channels of a tile of group means."""
    max_programs: int = 256
    """Programs of a launch; each has a Gram matrix of its own, so that all of them stay in the second-level cache."""
    max_registers: int = 224
    """Per thread, for NVIDIA: without a bound ptxas spills to make room for a second program on each multiprocessor."""
    num_warps: int = 8
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Tiles of the kernels that walk the members of groups."""

    groups: int
    """Groups of a tile."""
    members: int
    """Members of each group that one step takes."""
    channels: int
    """Channels of a tile."""
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class GatherSettings:
    """Tiles of the kernels that give every token what its group holds."""

    tokens: int = 16
    channels: int = 128
    num_warps: int = 4


@dataclass(frozen=True, kw_only=True)
class CountSettings:
    """Tiles of the kernel that sorts tokens by group."""

    rows: int = 32
    columns: int = 32
    num_warps: int = 4


def match_settings(num_tokens: int, dtype: torch.dtype) -> MatchSettings:
    """Tiles for matching `num_tokens` tokens.

    >>> match_settings(196, torch.bfloat16).slots
    256
    """
    assert num_tokens <= MAX_TOKENS, num_tokens
    slots = max(64, _next_power_of_two(num_tokens))
    return MatchSettings(slots=slots, gram_rows=64, gram_channels=16 if dtype == torch.float32 else 64)


def group_settings(num_tokens: int, num_groups: int, num_channels: int) -> GroupSettings:
    """Tiles for merging and morphing: few large groups are walked several members at a time.

    >>> group_settings(196, 98, 512).members, group_settings(196, 8, 512).members
    (1, 8)
    """
    channels = min(128, max(16, _next_power_of_two(num_channels)))
    if num_tokens <= 8 * num_groups:
        return GroupSettings(groups=16, members=1, channels=channels)
    return GroupSettings(groups=2, members=8, channels=channels)


def loss_settings(num_channels: int) -> GroupSettings:
    """Tiles of the loss where channels count one by one. How large groups are is not known: a middling shape."""
    return GroupSettings(groups=8, members=2, channels=min(128, max(16, _next_power_of_two(num_channels))))


def row_loss_settings(num_channels: int) -> GroupSettings:
    """Tiles of the loss where a group's channels count together: rows are as wide as C.

    Rows of more than 32,768 channels no longer fit the registers: right, but slow.

    >>> row_loss_settings(768).channels
    1024
    """
    channels = max(16, _next_power_of_two(num_channels))
    if channels <= 512:
        return GroupSettings(groups=4 if channels <= 256 else 2, members=2, channels=channels)
    return GroupSettings(groups=1, members=2, channels=channels, num_warps=min(32, max(4, channels // 512)))


def slope_dtype(outputs: torch.dtype, kind: str) -> torch.dtype:
    """What the derivative per group is saved in: the outputs' dtype, but where it is unbounded not float16.

    >>> slope_dtype(torch.float16, "smooth_l1"), slope_dtype(torch.float16, "l2")
    (torch.float16, torch.float32)
    """
    return torch.float32 if outputs == torch.float16 and kind in ("l2", "cosine") else outputs


def gather_settings(num_channels: int) -> GatherSettings:
    """Tiles for unmerging and for the loss's backward."""
    return GatherSettings(channels=min(128, max(16, _next_power_of_two(num_channels))))


def count_settings() -> CountSettings:
    """Tiles for sorting tokens by group."""
    return CountSettings()


def _next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
