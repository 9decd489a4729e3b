"""Which launches are compiled and measured: every kernel at the settings shipped, over token counts, dtypes, options.

Batch 128 and 512 channels unless the name says otherwise. Tensors are on the meta device: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtm_triton.kernels import launch, masks, sample, settings, tables
from dtm_triton.kernels.recording import Launch, identity, recording

BATCH, CHANNELS, SCHEDULES, LEFT = 128, 512, 2, 98
TOKENS = (64, 196, 197, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False)
RANDOM, THRESHOLD = PLAIN | {"random_split": True}, PLAIN | {"threshold": 0.5}
KEPT: dict[str, Any] = dict(num_protected=1, random_split=False, keep_order=True)
MERGE = KEPT | {"merge_rows": LEFT}
ALL = RANDOM | MERGE | {"random_split": True, "threshold": 0.5}
OTHER_FORM: dict[bool, dict[str, Any]] = {
    True: {"fused": True, "max_registers": 255},
    False: {"fused": False, "max_registers": 128},
}
"""Matching in one launch, and with a launch for the Gram matrices, as tuning may choose where it is not the default."""


def launches(target: str) -> dict[str, Launch]:
    """What is launched on the GPU family `target`, by name; what compiles to the same code is there once.

    An op of several launches has each kernel's name added to its own, and a number where a kernel comes again.
    """
    found: dict[str, Launch] = {}
    known: set[str] = set()
    for name, situation in situations(target).items():
        with recording(target) as recorded:
            situation()
        assert recorded, f"{name} launches nothing"
        for one in recorded:
            if identity(one) not in known:
                known.add(identity(one))
                own = name if len(recorded) == 1 else f"{name} {one.name}"
                again = sum(other == own or other.startswith(f"{own} #") for other in found)
                found[f"{own} #{again + 1}" if again else own] = one
    return found


def situations(target: str) -> dict[str, Callable[[], object]]:
    """The calls whose launches are measured, by name."""
    match, other = partial(_match, target), partial(_match, target, other_form=True)
    bf16, fp32 = torch.bfloat16, torch.float32
    found: dict[str, Callable[[], object]] = {}
    for short, dtype in DTYPES.items():
        for tokens in TOKENS:
            found[f"match-{short}-{tokens}"] = partial(match, dtype, tokens, PLAIN)
    for tokens in (64, 196, 512, 1024):  # everything at once takes the most registers
        batch = 16 if tokens > 256 else BATCH
        found[f"match-bf16-{tokens}-all"] = partial(match, bf16, tokens, ALL, batch=batch)
    variants = {"random": RANDOM, "threshold": THRESHOLD, "merge": MERGE, "two": KEPT | {"num_protected": 2}}
    for variant, options in variants.items():
        found[f"match-bf16-196-{variant}"] = partial(match, bf16, 196, options)
    found |= {
        "match-bf16-1024": partial(match, bf16, 1024, PLAIN, batch=16),
        "match-other-bf16-64": partial(other, bf16, 64, PLAIN),
        "match-other-bf16-196": partial(other, bf16, 196, PLAIN),
        "match-other-bf16-196-all": partial(other, bf16, 196, ALL),
        "match-other-fp32-196": partial(other, fp32, 196, PLAIN),
    }
    for short in ("bf16", "fp32"):
        others = _stream(target, DTYPES[short]) | _groups(DTYPES[short]) | _losses(DTYPES[short])
        found |= {f"{name}-{short}": situation for name, situation in others.items()}
    numbers = _empty(BATCH, 13, 5, dtype=torch.float64), _empty(BATCH, 196, dtype=torch.float32)
    found["masks"] = partial(masks.block_cover, *numbers, (14, 14), num_masked=75, min_patches=16)
    found |= _samples()
    found["members"] = partial(launch.group_members, _empty(BATCH, 196), LEFT)
    return found


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _match(
    target: str,
    dtype: torch.dtype,
    tokens: int,
    options: dict[str, Any],
    *,
    other_form: bool = False,
    batch: int = BATCH,
    iterations: int = 14,
    channels: int = CHANNELS,
) -> None:
    """Matching in the form that is shipped, or in the other one."""
    schedules = 1 if "merge_rows" in options else SCHEDULES
    removed, seed = _empty(schedules, iterations), _empty(1, dtype=torch.int64)
    trial: Any = nullcontext()
    if other_form:
        bucket = settings.match_bucket(tokens, dtype, schedules * batch)
        shipped = tables.table(target)["settings"].get("match", {}).get(bucket, {})
        fused = settings.match_settings(tokens, dtype, schedules * batch, target).fused
        trial = tables.trial(target, "match", bucket, shipped | OTHER_FORM[not fused])
    with trial:
        launch.match(_empty(batch, tokens, channels, dtype=dtype), removed, seed, **options)


def _stream(target: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Many tokens: one iteration, or more than the schedule kernel holds."""
    stream = partial(_match, target, dtype, iterations=1)
    two = RANDOM | {"threshold": 0.5, "num_protected": 1}
    found: dict[str, Callable[[], object]] = {
        "stream-577": partial(stream, 577, MERGE, batch=256, channels=768),
        "stream-4096": partial(stream, 4096, PLAIN, batch=8, channels=320),
        "stream-4096-two-iterations": partial(stream, 4096, two, batch=8, channels=320, iterations=2),
    }
    if dtype == torch.bfloat16:
        found |= {
            "stream-4096-wide": partial(stream, 4096, KEPT, batch=8, channels=768),
            "stream-16384": partial(stream, 16384, THRESHOLD | {"num_protected": 2}, batch=1, channels=320),
        }
    return found


def _groups(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x, merged = _empty(BATCH, 196, CHANNELS, dtype=dtype), _empty(BATCH, LEFT, CHANNELS, dtype=dtype)
    index, size, few = _empty(BATCH, 196), _empty(BATCH, LEFT), _empty(BATCH, 8)
    weight = _empty(BATCH, 196, 1, dtype=dtype)
    return {
        "merge": partial(launch.merge, x, index, size, "mean"),
        "merge-few": partial(launch.merge, x, index, few, "amax"),
        "weighted-merge": partial(launch.weighted_merge, x, weight, index, size),
        "unmerge": partial(launch.unmerge, merged, index),
        "morph": partial(launch.morph, x, index, size),
        "morph-few": partial(launch.morph, x, index, few),
    }


def _samples() -> dict[str, Callable[[], object]]:
    """AMT's counts at 196 patches, and shares like them elsewhere."""
    seeds = _empty(BATCH, dtype=torch.int64)

    def draw(
        weights: Tensor | sample.Crops, side: int, masked: int, thrown: int, unit: int = 1
    ) -> Callable[[], object]:
        order = ("masked", "thrown", "visible")
        return partial(sample.sample, weights, seeds, (side, side), masked, thrown, unit, 1.0, 0.01, order)

    def crops(dtype: torch.dtype, side: int) -> sample.Crops:
        places, flip = _empty(BATCH, 4, dtype=torch.float64), _empty(BATCH, dtype=torch.bool)
        return sample.Crops(_empty(BATCH, side, side, dtype=dtype), places, flip, (0.0, 0.0))

    return {
        "sample": draw(_empty(BATCH, 196, dtype=torch.float32), 14, 88, 78),
        "sample-crops": draw(crops(torch.uint8, 14), 14, 88, 78),
        "sample-crops-units": draw(crops(torch.uint8, 14), 14, 88, 52, unit=2),
        "sample-crops-1024": draw(crops(torch.float16, 32), 32, 460, 409),
        "sample-crops-4096": draw(crops(torch.float16, 32), 64, 1840, 1636),
    }


def _losses(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    index, slopes = _empty(SCHEDULES, BATCH, 196), _empty(BATCH, 196, CHANNELS, dtype=dtype)

    def forward(kind: str, standardize: bool, channels: int = CHANNELS, batch: int = BATCH) -> Callable[[], object]:
        x = _empty(batch, 196, channels, dtype=dtype)
        options: dict[str, Any] = dict(kind=kind, beta=2.0, normalize_target=standardize, save=True)
        return partial(launch.loss_forward, x, x, index[:, :batch], index[:, :batch], **options)

    return {
        "loss": forward("smooth_l1", False),
        "loss-small-batch": forward("smooth_l1", False, batch=16),
        "loss-cosine": forward("cosine", False),
        "loss-standardized": forward("smooth_l1", True),
        "loss-standardized-wide": forward("cosine", True, channels=2048),
        "loss-backward": partial(launch.loss_backward, _empty(1, dtype=torch.float32), slopes, 1e-7, dtype),
    }
