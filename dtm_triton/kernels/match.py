"""The launcher of matching: in one launch, in two with the Gram matrices first, or streaming for many tokens."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings
from dtm_triton.kernels.groups import merge
from dtm_triton.kernels.match_gram import gram_kernel
from dtm_triton.kernels.match_kernel import match_kernel
from dtm_triton.kernels.precision import INTERPRETED, dot_precision
from dtm_triton.kernels.settings import MatchSettings
from dtm_triton.kernels.stream_match import stream_match
from dtm_triton.kernels.tables import family


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
    ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Group tokens by iterated bipartite matching, for every schedule. Source: DTM, Algorithm 1.

    features [B, N, C], float32, float16 or bfloat16, any strides; removed int32 [L, K] and seed int64 [1], which may
    lie on the CPU; pairs that are not more similar than `threshold` never merge; ticket: an int32 [1] to set to 0.
    Returns index, size (padded with zeros) and members (tokens sorted by group), int32 [L, B, N], and with
    merge_rows > 0 (an upper bound of the number of groups; L = 1) every group's mean [B, merge_rows, C].
    """
    batch, num_tokens, num_channels = features.shape
    num_schedules, num_iterations = removed.shape
    device = features.device
    assert num_protected in (0, 1, 2), num_protected
    assert not (random_split and num_protected == 2), "two protected tokens need the alternating split"
    assert merge_rows == 0 or num_schedules == 1, (merge_rows, num_schedules)
    removed = on_device("schedules", removed, device).to(torch.int32).contiguous()
    seed = on_device("seed", seed, device) if random_split else removed
    if num_tokens > (settings.MAX_MATRIX_TOKENS if num_iterations == 1 else settings.MAX_SLOTS):
        index, size, members = stream_match(
            features,
            removed,
            seed,
            num_protected=num_protected,
            random_split=random_split,
            keep_order=keep_order,
            threshold=threshold,
        )
        if ticket is not None:
            ticket.zero_()
        merged = merge(features, members[0], size[0, :, :merge_rows], "mean") if merge_rows else None
        return index, size, members, merged

    index, size, members = (
        torch.empty((num_schedules, batch, num_tokens), dtype=torch.int32, device=device) for _ in range(3)
    )
    merged = None
    if merge_rows:
        merged = torch.empty((batch, merge_rows, num_channels), dtype=features.dtype, device=device)
    if index.numel() == 0:
        return index, size, members, merged
    tiles = settings.match_settings(num_tokens, features.dtype, num_schedules * batch, family(device))
    gram_stride = triton.cdiv(num_tokens, 16) * 16
    if tiles.fused:
        images, programs = batch, min(num_schedules * batch, tiles.max_programs)
    else:
        matrix_bytes = 4 * num_schedules * (num_tokens + 1) * gram_stride
        chunks = triton.cdiv(batch, max(1, settings.SCRATCH_BYTES // matrix_bytes))
        images = triton.cdiv(batch, chunks)  # chunks of one size: a small last one would leave the GPU idle
        programs = num_schedules * images
    gram = torch.empty((programs, num_tokens + 1, gram_stride), dtype=torch.float32, device=device)
    lists = torch.empty((programs * 8 * tiles.slots + 1,), dtype=torch.int32, device=device)
    for first_image in range(0, batch, images):
        count = min(images, batch - first_image)
        if not tiles.fused:
            _form_grams(features, gram, first_image, count, num_schedules, gram_stride, tiles)
        with torch.cuda.device_of(features):
            match_kernel[(min(programs, num_schedules * count),)](
                features=features if tiles.fused or merge_rows else gram,  # not read: compiled once for all dtypes
                removed=removed,
                seed=seed,
                index=index,
                size=size,
                members=members,
                merged=features if merged is None else merged,
                ticket=lists[-1:] if ticket is None else ticket,
                gram_scratch=gram,
                list_scratch=lists,
                first_image=first_image,
                images=count,
                batch=batch,
                num_schedules=num_schedules,
                num_tokens=num_tokens,
                num_channels=num_channels,
                num_iterations=num_iterations,
                merge_rows=merge_rows,
                threshold=0.0 if threshold is None else max(float(threshold), settings.LEAST_THRESHOLD),
                stride_b=features.stride(0),
                stride_n=features.stride(1),
                stride_c=features.stride(2),
                gram_stride=gram_stride,
                FUSED=tiles.fused,
                NUM_PROTECTED=num_protected,
                RANDOM_SPLIT=random_split,
                KEEP_ORDER=keep_order,
                THRESHOLD=threshold is not None,
                MERGE=merged is not None,
                PRECISION=dot_precision(features.dtype),
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
                **settings.register_bound(tiles.max_registers),
            )
    return index, size, members, merged


def _form_grams(
    features: Tensor,
    gram: Tensor,
    first_image: int,
    images: int,
    num_schedules: int,
    gram_stride: int,
    tiles: MatchSettings,
) -> None:
    """The Gram matrices of some images, once for every schedule: gram [L * images, N + 1, gram_stride]."""
    _, num_tokens, num_channels = features.shape
    edge = triton.cdiv(num_tokens, tiles.gram_rows)
    with torch.cuda.device_of(features):
        gram_kernel[(images * edge * edge,)](
            features=features,
            gram_scratch=gram,
            first_image=first_image,
            images=images,
            edge=edge,
            num_schedules=num_schedules,
            num_tokens=num_tokens,
            num_channels=num_channels,
            stride_b=features.stride(0),
            stride_n=features.stride(1),
            stride_c=features.stride(2),
            gram_stride=gram_stride,
            ROWS=tiles.gram_rows,
            CHANNELS=tiles.gram_channels,
            PRECISION=dot_precision(features.dtype),
            UPCAST=INTERPRETED,
            num_warps=tiles.gram_warps,
            num_stages=tiles.gram_stages,
            enable_fp_fusion=True,
            **settings.register_bound(settings.GRAM_REGISTERS),
        )


def on_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied there without waiting.

    Raises RuntimeError while a CUDA graph is captured: every replay would read memory that is the CPU's.

    >>> on_device("seed", torch.zeros(1), torch.device("cpu"))
    tensor([0.])
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} must be on {device} to be captured in a CUDA graph, got a tensor on {tensor.device}"
        )
    return tensor.to(device, non_blocking=True)
