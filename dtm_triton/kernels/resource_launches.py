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

from dtm_triton.kernels import launch, settings, tables
from dtm_triton.kernels.recording import Launch, identity, recording

BATCH, CHANNELS, SCHEDULES, LEFT = 128, 512, 2, 98
TOKENS = (64, 196, 197, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False)
RANDOM, THRESHOLD = PLAIN | {"random_split": True}, PLAIN | {"threshold": 0.5}
KEPT: dict[str, Any] = dict(num_protected=1, random_split=False, keep_order=True)
MERGE = KEPT | {"merge_rows": LEFT}
ALL = RANDOM | MERGE | {"random_split": True, "threshold": 0.5}
FORMS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True, "max_registers": 255},
    "split": {"fused": False, "max_registers": 128},
}
"""Matching in one launch, and with a launch for the Gram matrices: how tuning may choose what is not the default."""


def launches(target: str) -> dict[str, Launch]:
    """What is launched on the GPU family `target`, by name; what compiles to the same code is there once.

    An op of several launches has each kernel's name added to its own.
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
                found[name if len(recorded) == 1 else f"{name} {one.name}"] = one
    return found


def situations(target: str) -> dict[str, Callable[[], object]]:
    """The calls whose launches are measured, by name."""
    found: dict[str, Callable[[], object]] = {}
    for form in FORMS:
        match = partial(_match, target, form)
        for short, dtype in DTYPES.items():
            for tokens in TOKENS:
                found[f"match-{form}-{short}-{tokens}"] = partial(match, dtype, tokens, PLAIN)
                if short != "fp16":  # everything at once needs most
                    found[f"match-{form}-{short}-{tokens}-all"] = partial(match, dtype, tokens, ALL)
        variants = {"random": RANDOM, "threshold": THRESHOLD, "merge": MERGE, "two": KEPT | {"num_protected": 2}}
        for variant, options in variants.items():
            found[f"match-{form}-bf16-196-{variant}"] = partial(match, torch.bfloat16, 196, options)
    for tokens in (512, 1024):
        for variant, options in {"": PLAIN, "-all": ALL}.items():
            found[f"match-bf16-{tokens}{variant}"] = partial(_match, target, None, torch.bfloat16, tokens, options)
    for short in ("bf16", "fp32"):
        others = _stream(DTYPES[short]) | _groups(DTYPES[short]) | _losses(DTYPES[short])
        found |= {f"{name}-{short}": situation for name, situation in others.items()}
    found["members"] = partial(launch.group_members, _empty(BATCH, 196), LEFT)
    return found


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _match(
    target: str,
    form: str | None,
    dtype: torch.dtype,
    tokens: int,
    options: dict[str, Any],
    *,
    batch: int = BATCH,
    iterations: int = 14,
    channels: int = CHANNELS,
) -> None:
    """Matching in the form that is shipped (None), or in one of the two."""
    schedules = 1 if "merge_rows" in options else SCHEDULES
    removed, seed = _empty(schedules, iterations), _empty(1, dtype=torch.int64)
    trial: Any = nullcontext()
    if form and FORMS[form]["fused"] != settings.match_settings(tokens, dtype, schedules * batch, target).fused:
        bucket = settings.match_bucket(tokens, dtype, schedules * batch)
        shipped = tables.table(target)["settings"].get("match", {}).get(bucket, {})
        trial = tables.trial(target, "match", bucket, shipped | FORMS[form])
    with trial:
        launch.match(_empty(batch, tokens, channels, dtype=dtype), removed, seed, **options)


def _stream(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Many tokens and one iteration."""
    stream = partial(_match, "", None, dtype, iterations=1)
    return {
        "stream-577": partial(stream, 577, MERGE, batch=256, channels=64),
        "stream-4096": partial(stream, 4096, PLAIN, batch=8, channels=320),
        "stream-4096-random": partial(stream, 4096, RANDOM, batch=8, channels=320),
        "stream-16384": partial(stream, 16384, THRESHOLD, batch=2, channels=320),
    }


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
