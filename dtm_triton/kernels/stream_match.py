"""The launcher of matching by streaming: any number of tokens, several iterations, no N x N array anywhere.

An iteration takes two launches for up to 1,024 tokens: partners (norms come from the tiles that go by, since a pass of
their own would read the features from memory twice), then all of selection, one program a task. With more tokens four:
norms, because each would be taken once for every 128 A-slots; partners; selection; and the comparisons of pairs,
spread over the GPU. A random split adds two launches, one of them a sort. With the alternating split the partners of
the first iteration are found once for all schedules.

Estimates, not measured (H200 at 790 TFLOP/s and 4.3 TB/s, C = 320, bfloat16, one iteration). Products, 2 C H^2: 3.4 us
an image at N = 4,096 and 54 us at 16,384. Finding the maximum takes five instructions an entry, a quarter of the
product's time, some of it hidden by the other warp group: assuming 65 % of the matrix rate, 5.2 and 83 us. Norms take
0.6 and 2.4 us; selection 8 us, which up to 132 images share; pairs at most 0.5 and 7 us. Together 55 to 60 % of the
matrix rate for many images, 6 and 90 us each; one image alone 20 us, most of it latencies, and 105 us.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings, stream_settings
from dtm_triton.kernels.groups import group_members, merge
from dtm_triton.kernels.stream_iteration import Rule, run_iteration
from dtm_triton.kernels.stream_place import follow_kernel

FOLLOW_BLOCK = 1024
"""Tokens of a program that lets them follow their slots."""

MAX_TASKS = 65535
"""The most programs that a grid takes along its later axes."""


def stream_match(
    features: Tensor,
    removed: Tensor,
    seed: Tensor,
    *,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group tokens by iterated bipartite matching, for every schedule. Source: DTM, Algorithm 1.

    features [B, N, C], float32, float16 or bfloat16, any strides; removed int32 [L, K], contiguous, and seed int64 [1]
    (only read for a random split), both on the features' device; pairs that are not more similar than `threshold` never
    merge. Returns index, size (padded with zeros) and members (tokens sorted by group), int32 [L, B, N].

    >>> x = torch.eye(4)[None, [0, 0, 1, 1]]  # in Triton's interpreter, or moved to a GPU
    >>> stream_match(x, torch.tensor([[2]], dtype=torch.int32), torch.tensor([0]), num_protected=0, random_split=False,
    ...              keep_order=False, threshold=None)[0].tolist()  # doctest: +SKIP
    [[[0, 0, 1, 1]]]
    """
    batch, num_tokens, _ = features.shape
    num_schedules, num_iterations = removed.shape
    assert removed.dtype == torch.int32 and removed.is_contiguous(), (removed.dtype, removed.stride())
    device = features.device
    index, size, members = (
        torch.empty((num_schedules, batch, num_tokens), dtype=torch.int32, device=device) for _ in range(3)
    )
    if num_iterations == 0:
        index.copy_(torch.arange(num_tokens, device=device))
        members.copy_(index)
        size.fill_(1)
    elif index.numel() > 0:
        fitting = stream_settings.STREAM_SCRATCH_BYTES // _bytes_per_image(features, removed)
        images = max(1, min(fitting, MAX_TASKS // num_schedules))
        rule = Rule(
            num_protected=num_protected,
            random_split=random_split,
            keep_order=keep_order,
            threshold=None if threshold is None else max(float(threshold), settings.LEAST_THRESHOLD),
        )
        for first in range(0, batch, images):
            part = slice(first, first + images)
            groups = index[:, part], size[:, part], members[:, part]
            _match_images(features[part], removed, seed, first, groups, rule)
    return index, size, members


def _bytes_per_image(features: Tensor, removed: Tensor) -> int:
    """An upper bound of the scratch memory for one image; B is dealt to so few programs that their keys are small."""
    _, num_tokens, num_channels = features.shape
    num_schedules, num_iterations = removed.shape
    per_slot = 68 if num_iterations == 1 else 80 + 8 * num_channels
    return num_schedules * settings.next_power_of_two(num_tokens) * per_slot


def _match_images(
    features: Tensor,
    removed: Tensor,
    seed: Tensor,
    first_image: int,
    groups: tuple[Tensor, Tensor, Tensor],
    rule: Rule,
) -> None:
    """All iterations on some images: fills their index, size and members [L, images, N]."""
    index, size, members = groups
    num_schedules, images, num_tokens = index.shape
    num_iterations = removed.shape[1]
    tasks = num_schedules * images
    left = torch.empty((num_iterations + 1, tasks), dtype=torch.int32, device=index.device)
    run_iteration(features, removed, seed, first_image, 0, left, groups, rule)
    if num_iterations == 1:
        return
    moved, counts, slots = moves = (
        torch.empty((num_schedules, images, num_tokens), dtype=torch.int32, device=index.device),
        torch.empty((num_schedules, images, num_tokens), dtype=torch.int32, device=index.device),
        torch.empty((num_schedules, images, num_tokens), dtype=torch.int32, device=index.device),
    )
    sums, spare = (
        torch.empty((tasks, *features.shape[1:]), dtype=torch.float32, device=index.device) for _ in range(2)
    )
    for schedule in range(num_schedules):
        part = sums[schedule * images : (schedule + 1) * images]
        merge(features, members[schedule], size[schedule], "sum", out=part)
    for iteration in range(1, num_iterations):
        last = iteration + 1 == num_iterations
        run_iteration(sums, removed, seed, first_image, iteration, left, moves, rule)
        if last:
            size.zero_()
        _follow_slots(index, size, moved, last)
        if not last:
            merge(sums, slots.flatten(0, 1), counts.flatten(0, 1), "sum", out=spare)
            sums, spare = spare, sums
    for schedule in range(num_schedules):
        members[schedule] = group_members(index[schedule], num_tokens)


def _follow_slots(index: Tensor, size: Tensor, moved: Tensor, count: bool) -> None:
    """Tokens go where their slots went: index, moved int32 [L, images, N]; counts them into `size`, which is zero."""
    num_schedules, images, num_tokens = moved.shape
    with torch.cuda.device_of(index):
        follow_kernel[(triton.cdiv(num_tokens, FOLLOW_BLOCK), num_schedules * images)](
            index=index,
            size=size,
            moved=moved,
            images=images,
            num_tokens=num_tokens,
            schedule_stride=index.stride(0),
            COUNT=count,
            TOKENS=FOLLOW_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
