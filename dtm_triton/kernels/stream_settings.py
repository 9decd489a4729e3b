"""How streaming matching is launched: tiles and warps as plain data, by shape bucket and GPU family.

Nothing here asks the device. The defaults compile without spilling for every target in tests/kernels/resources.json;
a family's table under tuned/ overrides them bucket by bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtm_triton.kernels.settings import list_slots, next_power_of_two
from dtm_triton.kernels.tables import tuned

STREAM_SCRATCH_BYTES = 256 * 2**20
"""Images are taken in chunks whose scratch memory fits in here (or one at a time)."""

RESIDENT_FAMILIES = ("sm_90", "sm_100", "sm_103")
"""GPUs whose multiprocessors have 227 KiB of shared memory."""

TENSOR_MEMORY_FAMILIES = ("sm_100", "sm_103")
"""GPUs that hold products outside the registers: finding the maximum of 128 columns there spills."""

RESIDENT_CHANNELS = 320
"""Up to here 128 rows of A and three tiles of 64 rows of B fit 227 KiB in half precision: 640 bytes a channel."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Tiles of streaming matching."""

    rows: int = 128
    """A-slots of a program."""
    columns: int = 128
    """B-slots that a step takes."""
    channels: int = 64
    """Channels that a step of the product takes."""
    resident: bool = False
    """The tile of A stays on chip, and a step takes all channels."""
    norms: bool = False
    """Norms are taken from the tiles that go by, which saves a launch and a pass over the features."""
    programs: int = 128
    """B is dealt to several programs where there would be fewer than this."""
    num_warps: int = 8
    num_stages: int = 3
    norm_rows: int = 32
    """Slots of a program of the norms' own launch."""
    place: bool = False
    """Slots are placed in the launch that selects, by its one program a task."""
    place_rows: int = 64
    """Slots that are placed together."""
    place_columns: int = 64
    """Slots that a step of placing compares them to."""
    select_block: int = 1024
    """Slots that selection moves at a time."""
    select_warps: int = 8
    """Warps of selection."""


def stream_bucket(num_tokens: int, num_channels: int, dtype: torch.dtype) -> str:
    """What decides the settings of streaming: tokens, channels and the width of the dtype.

    >>> stream_bucket(4096, 320, torch.bfloat16)
    'n4096 c512 half'
    """
    width = "single" if dtype == torch.float32 else "half"
    return f"n{list_slots(num_tokens)} c{max(16, next_power_of_two(num_channels))} {width}"


def stream_settings(num_tokens: int, num_channels: int, dtype: torch.dtype, family: str) -> StreamSettings:
    """Tiles for matching `num_tokens` tokens of `num_channels` channels.

    >>> stream_settings(4096, 320, torch.bfloat16, "sm_90").resident
    True
    """
    slots = list_slots(num_tokens)
    few = slots <= 1024
    single = dtype == torch.float32
    resident = not single and not few and num_channels <= RESIDENT_CHANNELS and family in RESIDENT_FAMILIES
    narrow = single or resident or (family in TENSOR_MEMORY_FAMILIES and not few)
    default = StreamSettings(
        rows=64 if single else 128,
        columns=64 if narrow else 128,
        channels=32 if single else 64,
        resident=resident,
        norms=few,
        num_warps=4 if single else 8,
        num_stages=2 if single else 3,
        place=few,
        select_warps=min(16, max(4, slots // 512)),
    )
    return tuned(default, "stream", stream_bucket(num_tokens, num_channels, dtype), family)


def resident_parts(num_channels: int) -> tuple[int, int]:
    """Channels as at most two powers of two, which are multiplied one after the other.

    >>> resident_parts(320), resident_parts(256), resident_parts(200)
    ((256, 64), (256, 0), (128, 128))
    """
    wide = max(16, next_power_of_two(num_channels + 1) // 2)
    return wide, max(16, next_power_of_two(num_channels - wide)) if num_channels > wide else 0
