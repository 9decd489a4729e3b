"""How the kernels are launched: tile sizes and warps as plain data, chosen by op, shape bucket and GPU family.

Nothing here asks the device. The defaults are settings that compile without spilling for every target in
tests/kernels/resources.json; a family's table under tuned/ overrides them bucket by bucket (`tables`). Tests swap the
functions below for ones that return tiny tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtm_triton.kernels.tables import tuned

MAX_MATRIX_TOKENS = 128
"""One iteration on more tokens than this streams over them: it takes as many launches, and stores no Gram matrix."""

MAX_SLOTS = 1024
"""More tokens than this do not fit the schedule kernel: any number of iterations streams over them."""

MAX_COUNTED_TOKENS = 1024
"""Up to here the tokens are sorted by group by counting, which takes N^2 comparisons."""

LEAST_THRESHOLD = -2.0
"""What a lower threshold counts as: below every similarity that is a number, above the others."""

SCRATCH_BYTES = 256 * 2**20
"""Images are taken in chunks whose Gram matrices fit in here (or one at a time)."""

GRAM_REGISTERS = 255
"""Per thread, for NVIDIA: without a bound ptxas takes fewer in the Gram launch, and spills."""

FEW_TASKS = 64
"""Up to here one program a task leaves half of a large GPU's multiprocessors idle."""

EXTENT_BLOCK = 256
"""Group sizes that a program adds at a time to find where its own groups start."""


FEW_SCHEDULES = 4
"""Schedules whose slopes add up in half precision with an error near that of rounding once."""

SCALE_BLOCK = 2048
"""Entries of the gradient that a program of the backward scales: 16 bytes a load and thread in half precision."""


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """Tiles of matching on the Gram matrix."""

    fused: bool
    """Everything in one launch; otherwise a launch for the Gram matrices and one for the schedules."""
    slots: int
    """Tokens rounded up to a power of two: the length of every per-token list."""
    gram_rows: int
    """Rows and columns of a tile of the Gram matrix."""
    gram_channels: int
    """Channels that one step of the Gram matrix product takes."""
    max_registers: int
    """Per thread, for NVIDIA: the single launch needs many; without them, two programs share a multiprocessor."""
    rank_columns: int
    """Keys that one step of ranking by counting takes."""
    gram_warps: int = 4
    """Warps of the Gram launch, when that is one of its own."""
    gram_stages: int = 3
    """Pipeline stages of the Gram launch, when that is one of its own."""
    match_rows: int = 64
    """A-slots that look for their partner together."""
    match_columns: int = 32
    """B-slots that a step of that search takes."""
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
    """Programs of the single launch; each has a Gram matrix of its own, so that all stay in the second-level cache."""
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
class LossSettings(GroupSettings):
    """Tiles of the loss kernels."""

    max_registers: int = 128
    """Per thread, for NVIDIA: without a bound ptxas takes fewer, and spills."""


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


def match_bucket(num_tokens: int, dtype: torch.dtype, num_tasks: int) -> str:
    """What decides the settings of matching: slots, width of the dtype, and whether tasks can fill a GPU.

    >>> match_bucket(196, torch.bfloat16, 256)
    'n256 half many'
    """
    width = "single" if dtype == torch.float32 else "half"
    return f"n{list_slots(num_tokens)} {width} {'few' if num_tasks <= FEW_TASKS else 'many'}"


def match_settings(num_tokens: int, dtype: torch.dtype, num_tasks: int, family: str) -> MatchSettings:
    """Tiles for matching `num_tokens` tokens in `num_tasks` (schedule, image) pairs.

    >>> match_settings(196, torch.bfloat16, 256, "cpu").slots
    256
    """
    assert num_tokens <= MAX_SLOTS, num_tokens
    fused, slots = num_tokens <= 64, list_slots(num_tokens)
    default = MatchSettings(
        fused=fused,
        slots=slots,
        gram_rows=64,
        gram_channels=16 if dtype == torch.float32 else 64,
        max_registers=224 if fused else 128,
        rank_columns=16 if slots <= 128 else 8,  # wider tiles of the ranking spill
        num_warps=16 if slots > 512 else 8,
    )
    return tuned(default, "match", match_bucket(num_tokens, dtype, num_tasks), family)


def group_bucket(num_tokens: int, num_groups: int, num_channels: int) -> str:
    """What decides the settings of merging and morphing: mean group size, and channels.

    >>> group_bucket(196, 98, 512)
    'small groups c128'
    """
    return f"{'small' if num_tokens <= 8 * num_groups else 'large'} groups c{_channels(num_channels)}"


def group_settings(num_tokens: int, num_groups: int, num_channels: int, family: str) -> GroupSettings:
    """Tiles for merging and morphing: few large groups are walked several members at a time.

    >>> group_settings(196, 98, 512, "cpu").members, group_settings(196, 8, 512, "cpu").members
    (1, 8)
    """
    channels = _channels(num_channels)
    small = num_tokens <= 8 * num_groups
    default = GroupSettings(groups=16 if small else 2, members=1 if small else 8, channels=channels)
    return tuned(default, "groups", group_bucket(num_tokens, num_groups, num_channels), family)


def loss_bucket(num_channels: int, batch: int) -> str:
    """What decides the settings of the loss: channels, and whether images alone can fill a GPU.

    >>> loss_bucket(512, 128)
    'c128 many'
    """
    return f"c{_channels(num_channels)} {'few' if batch <= FEW_TASKS else 'many'}"


def loss_settings(num_channels: int, batch: int, family: str) -> LossSettings:
    """Tiles of the loss where channels count one by one. How large groups are is not known: a middling shape.

    >>> loss_settings(512, 128, "cpu").channels
    128
    """
    channels = min(_channels(num_channels), 32 if batch <= FEW_TASKS else 128)
    return tuned(LossSettings(groups=8, members=2, channels=channels), "loss", loss_bucket(num_channels, batch), family)


def row_loss_bucket(num_channels: int) -> str:
    """What decides the settings of the loss where a group's channels count together.

    >>> row_loss_bucket(768)
    'c1024'
    """
    return f"c{max(16, next_power_of_two(num_channels))}"


def row_loss_settings(num_channels: int, family: str) -> LossSettings:
    """Tiles of the loss where a group's channels count together: rows are as wide as C.

    Rows of more than 32,768 channels no longer fit the registers: right, but slow.

    >>> row_loss_settings(768, "cpu").channels
    1024
    """
    channels = max(16, next_power_of_two(num_channels))
    if channels <= 512:
        default = LossSettings(groups=4 if channels <= 256 else 2, members=2, channels=channels)
    else:
        warps = min(32, max(4, channels // 512))
        registers = min(168, 2**16 // (32 * warps))  # a program of 32 warps gets no more
        default = LossSettings(groups=1, members=2, channels=channels, num_warps=warps, max_registers=registers)
    return tuned(default, "row_loss", row_loss_bucket(num_channels), family)


def slope_dtype(outputs: torch.dtype, kind: str, num_schedules: int) -> torch.dtype:
    """What the unscaled gradient is saved in: the outputs' dtype, but float32 where half precision would not do.

    It is unbounded for some losses, which float16 is not, and every further schedule is rounded again.

    >>> slope_dtype(torch.float16, "smooth_l1", 2), slope_dtype(torch.float16, "l2", 2)
    (torch.float16, torch.float32)
    """
    half = outputs in (torch.float16, torch.bfloat16)
    if half and (num_schedules > FEW_SCHEDULES or (outputs == torch.float16 and kind in ("l2", "cosine"))):
        return torch.float32
    return outputs


def gather_settings(num_channels: int, family: str) -> GatherSettings:
    """Tiles for unmerging.

    >>> gather_settings(512, "cpu").channels
    128
    """
    channels = _channels(num_channels)
    return tuned(GatherSettings(channels=channels), "gather", f"c{channels}", family)


def count_settings(family: str) -> CountSettings:
    """Tiles for sorting tokens by group.

    >>> count_settings("cpu").rows
    32
    """
    return tuned(CountSettings(), "count", "any", family)


def register_bound(max_registers: int) -> dict[str, int]:
    """The launch option that bounds registers, which only NVIDIA's compiler knows.

    >>> register_bound(128)
    {'maxnreg': 128}
    """
    return {} if torch.version.hip else {"maxnreg": max_registers}


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below `number`.

    >>> next_power_of_two(196), next_power_of_two(0)
    (256, 1)
    """
    return 1 << max(number - 1, 0).bit_length()


def list_slots(num_tokens: int) -> int:
    """The length of per-token lists.

    >>> list_slots(196), list_slots(9)
    (256, 64)
    """
    return max(64, next_power_of_two(num_tokens))


def _channels(num_channels: int) -> int:
    return min(128, max(16, next_power_of_two(num_channels)))
