"""The launcher of the matching kernel."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings
from dtm_triton.kernels.match_kernel import match_kernel
from dtm_triton.kernels.tables import family

INTERPRETED = not isinstance(match_kernel, triton.runtime.JITFunction)
"""Whether the kernels run in Triton's interpreter, which is chosen before they are imported."""


def match(
    features: Tensor,
    removed: Tensor,
    seed: Tensor,
    *,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None = None,
    merge_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Group tokens by iterated bipartite matching, once for every schedule, in one launch. Source: DTM, Algorithm 1.

    features [B, N, C], N <= 256, float32, float16 or bfloat16, any strides; removed int32 [L, K]; seed int64 [1].
    Returns index, size (padded with zeros) and members (tokens sorted by group), int32 [L, B, N], and with
    merge_rows > 0 (the number of groups, which the caller knows; L = 1) every group's mean [B, merge_rows, C].
    """
    batch, num_tokens, num_channels = features.shape
    num_schedules, num_iterations = removed.shape
    assert num_tokens <= settings.MAX_FUSED_TOKENS and num_protected in (0, 1, 2), (num_tokens, num_protected)
    assert not (random_split and num_protected == 2), "two protected tokens need the alternating split"
    assert merge_rows == 0 or num_schedules == 1, (merge_rows, num_schedules)
    device = features.device
    index, size, members = (
        torch.empty((num_schedules, batch, num_tokens), dtype=torch.int32, device=device) for _ in range(3)
    )
    merged = None
    if merge_rows:
        merged = torch.empty((batch, merge_rows, num_channels), dtype=features.dtype, device=device)
    if index.numel() == 0:
        return index, size, members, merged
    tiles = settings.match_settings(num_tokens, features.dtype, num_schedules * batch, family(device))
    programs = min(num_schedules * batch, tiles.max_programs)
    gram_stride = triton.cdiv(num_tokens, 16) * 16
    gram = torch.empty((programs, num_tokens + 1, gram_stride), dtype=torch.float32, device=device)
    lists = torch.empty((programs, 8 * tiles.slots), dtype=torch.int32, device=device)
    with torch.cuda.device_of(features):
        match_kernel[(programs,)](
            features=features,
            removed=removed.to(device, torch.int32, non_blocking=True).contiguous(),
            seed=seed.to(device, torch.int64, non_blocking=True),
            index=index,
            size=size,
            members=members,
            merged=features if merged is None else merged,
            gram_scratch=gram,
            list_scratch=lists,
            num_tasks=num_schedules * batch,
            batch=batch,
            num_tokens=num_tokens,
            num_channels=num_channels,
            num_iterations=num_iterations,
            merge_rows=merge_rows,
            stride_b=features.stride(0),
            stride_n=features.stride(1),
            stride_c=features.stride(2),
            gram_stride=gram_stride,
            NUM_PROTECTED=num_protected,
            RANDOM_SPLIT=random_split,
            KEEP_ORDER=keep_order,
            MERGE=merged is not None,
            PRECISION=gram_precision(features.dtype),
            UPCAST=INTERPRETED,
            SLOTS=tiles.slots,
            GRAM_ROWS=tiles.gram_rows,
            GRAM_CHANNELS=tiles.gram_channels,
            MATCH_ROWS=tiles.match_rows,
            MATCH_COLUMNS=tiles.match_columns,
            RANK_COLUMNS=tiles.rank_columns,
            LINK_ROWS=tiles.link_rows,
            MERGE_ROWS=tiles.merge_rows,
            MERGE_COLUMNS=tiles.merge_columns,
            BLOCK_COLUMNS=tiles.block_columns,
            MEAN_GROUPS=tiles.mean_groups,
            MEAN_CHANNELS=tiles.mean_channels,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
            **({} if torch.version.hip else {"maxnreg": tiles.max_registers}),
        )
    return index, size, members, merged


def gram_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: plain TF32 would change groups, and HIP knows no three-pass product."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None and not INTERPRETED else "ieee"
