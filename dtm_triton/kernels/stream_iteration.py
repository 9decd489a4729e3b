"""The launches of one streaming iteration: norms, partners, selection, places.

T = L * images tasks, all images of the first schedule first. N is the number of slots at the start: programs for slots
that are gone return at once, because how many are left stands on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings, stream_settings
from dtm_triton.kernels.precision import INTERPRETED, dot_precision
from dtm_triton.kernels.stream_partners import norm_kernel, partner_kernel, shuffle_key_kernel
from dtm_triton.kernels.stream_place import place_kernel
from dtm_triton.kernels.stream_select import select_kernel
from dtm_triton.kernels.stream_settings import StreamSettings
from dtm_triton.kernels.tables import family

KEY_BLOCK = 1024
"""Slots of a program that draws for a random split."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What decides who merges, beside the features."""

    num_protected: int
    random_split: bool
    keep_order: bool
    threshold: float | None


def run_iteration(
    x: Tensor,
    removed: Tensor,
    seed: Tensor,
    first_image: int,
    iteration: int,
    left: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    rule: Rule,
) -> None:
    """Where every slot moves, the new groups' sizes, and their slots: `result`, three int32 [L, images, N].

    x: features [images, N, C] in the first iteration, then sums [T, N, C]; left int32 [K + 1, T]: row `iteration` is
    read, but in the first iteration, where N slots are left, and the next row is written.
    """
    num_images, num_tokens, _ = x.shape
    tasks, half = left.shape[1], (num_tokens + 1) // 2
    matched = tasks if rule.random_split else num_images  # partners hang on the schedule only through the split
    tiles = stream_settings.stream_settings(num_tokens, x.shape[2], x.dtype, family(x.device))
    tiles_a, tiles_b = triton.cdiv(half, tiles.rows), triton.cdiv(num_tokens // 2, tiles.columns)
    shares = max(1, min(tiles.programs // (tiles_a * matched), tiles_b))
    key, partner = (torch.empty((shares, matched, half), dtype=torch.int32, device=x.device) for _ in range(2))
    inverse_norm = torch.empty(
        (matched if tiles.norms else num_images, num_tokens), dtype=torch.float32, device=x.device
    )
    with torch.cuda.device_of(x):
        shuffled = left
        if rule.random_split:
            shuffled = _shuffle(seed, left, num_tokens, result[0].shape[1], first_image, iteration, rule)
        _find_partners(x, shuffled, left[iteration], inverse_norm, key, partner, iteration, rule, tiles)
        _select(key, partner, inverse_norm, shuffled, removed, left, result, iteration, rule, tiles)


def _shuffle(
    seed: Tensor, left: Tensor, num_tokens: int, images: int, first_image: int, iteration: int, rule: Rule
) -> Tensor:
    """The slots in the order of their hashes, int64 [T, N]."""
    tasks = left.shape[1]
    key = torch.empty((tasks, num_tokens), dtype=torch.int32, device=left.device)
    shuffle_key_kernel[(triton.cdiv(num_tokens, KEY_BLOCK), tasks)](
        key=key,
        seed=seed,
        left=left[iteration],
        images=images,
        first_image=first_image,
        iteration=iteration,
        num_tokens=num_tokens,
        FIRST=iteration == 0,
        NUM_PROTECTED=rule.num_protected,
        SLOTS=KEY_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return key.sort(dim=1, stable=True).indices


def _find_partners(
    x: Tensor,
    shuffled: Tensor,
    left: Tensor,
    inverse_norm: Tensor,
    key: Tensor,
    partner: Tensor,
    iteration: int,
    rule: Rule,
    tiles: StreamSettings,
) -> None:
    """Norms, and every A-slot's best B-slot."""
    num_images, num_tokens, num_channels = x.shape
    shares, matched, half = key.shape
    if not tiles.norms:
        norm_kernel[(triton.cdiv(num_tokens, tiles.norm_rows), num_images)](
            features=x,
            left=left,
            inverse_norm=inverse_norm,
            num_tokens=num_tokens,
            num_channels=num_channels,
            stride_b=x.stride(0),
            stride_n=x.stride(1),
            stride_c=x.stride(2),
            FIRST=iteration == 0,
            UPCAST=INTERPRETED,
            ROWS=tiles.norm_rows,
            CHANNELS=tiles.channels,
            num_warps=4,
            enable_fp_fusion=True,
        )
    wide, rest = stream_settings.resident_parts(num_channels) if tiles.resident else (0, 0)
    partner_kernel[(triton.cdiv(half, tiles.rows), shares, matched)](
        features=x,
        shuffled=shuffled,
        left=left,
        inverse_norm=inverse_norm,
        key=key,
        partner=partner,
        images=num_images,
        num_tokens=num_tokens,
        num_channels=num_channels,
        stride_b=x.stride(0),
        stride_n=x.stride(1),
        stride_c=x.stride(2),
        FIRST=iteration == 0,
        NUM_PROTECTED=rule.num_protected,
        RANDOM_SPLIT=rule.random_split,
        NORMS=tiles.norms,
        WIDE=wide,
        REST=rest,
        PRECISION=dot_precision(x.dtype),
        UPCAST=INTERPRETED,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        CHANNELS=tiles.channels,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )


def _select(
    key: Tensor,
    partner: Tensor,
    inverse_norm: Tensor,
    shuffled: Tensor,
    removed: Tensor,
    left: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    iteration: int,
    rule: Rule,
    tiles: StreamSettings,
) -> None:
    """Who merges, and the new order."""
    index, size, members = result
    _, images, num_tokens = index.shape
    tasks, half = left.shape[1], max(16, settings.next_power_of_two((num_tokens + 1) // 2))
    lists = torch.empty((tasks, 9 * half), dtype=torch.int32, device=left.device)
    shared: dict[str, Any] = dict(
        shuffled=shuffled,
        left=left,
        lists=lists,
        index=index,
        size=size,
        members=members,
        images=images,
        num_tokens=num_tokens,
        iteration=iteration,
        schedule_stride=index.stride(0),
        FIRST=iteration == 0,
        NUM_PROTECTED=rule.num_protected,
        RANDOM_SPLIT=rule.random_split,
        KEEP_ORDER=rule.keep_order,
        HALF=half,
        ROWS=tiles.place_rows,
        COLUMNS=tiles.place_columns,
        enable_fp_fusion=True,
    )
    select_kernel[(tasks,)](
        key=key,
        partner=partner,
        inverse_norm=inverse_norm,
        removed=removed,
        matched=key.shape[1],
        normed=inverse_norm.shape[0],
        num_iterations=removed.shape[1],
        threshold=0.0 if rule.threshold is None else rule.threshold,
        THRESHOLD=rule.threshold is not None,
        SHARES=key.shape[0],
        BLOCK=min(half, tiles.select_block),
        PLACE=tiles.place,
        num_warps=tiles.select_warps,
        **shared,
    )
    if not tiles.place:
        place_kernel[(triton.cdiv(half, tiles.place_rows), tasks)](num_warps=4, **shared)
