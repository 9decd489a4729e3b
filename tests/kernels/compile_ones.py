"""Compile every kernel with arguments of 1, which Triton turns into constants that the interpreter does not know.

Only Triton's front end knows them: behind it they are numbers like all others, which test_resources.py compiles to the
end. Run by test_specialised.py without the interpreter; prints how many kernels compiled, and fails on the first that
does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend

from dtm_triton.kernels import launch, settings
from dtm_triton.kernels.recording import identity, recording, specialised
from dtm_triton.kernels.resources import TARGETS


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matching() -> None:
    options: dict[str, Any] = dict(num_protected=0, random_split=True, keep_order=False, threshold=0.5)
    shipped = settings.match_settings
    for fused in (True, False):
        with mock.patch.object(settings, "match_settings", lambda *shape: replace(shipped(*shape), fused=fused)):  # noqa: B023
            for batch, tokens, channels, schedules, iterations in (
                (1, 1, 1, 1, 1),
                (2, 20, 16, 1, 3),
                (1, 70, 1, 2, 1),
            ):
                features = empty(batch, tokens, channels, dtype=torch.float32)
                merge_rows = 1 if tokens == 20 else 0
                seed = empty(1, dtype=torch.int64)
                launch.match(features, empty(schedules, iterations), seed, **options, merge_rows=merge_rows)
    for tokens, iterations in ((300, 1), (1100, 2)):
        seed = empty(1, dtype=torch.int64)
        launch.match(empty(1, tokens, 1, dtype=torch.float32), empty(1, iterations), seed, **options)


def groups_and_losses() -> None:
    for batch, tokens, channels, count in ((1, 1, 1, 1), (2, 5, 1, 1), (1, 3, 3, 2)):
        x, weight = (empty(batch, tokens, size, dtype=torch.float32) for size in (channels, 1))
        merged = empty(batch, count, channels, dtype=torch.float32)
        index, size = empty(batch, tokens), empty(batch, count)
        launch.group_members(index, count)
        launch.merge(x, index, size, "mean")
        launch.weighted_merge(x, weight, index, size)
        launch.morph(x, index, size)
        launch.unmerge(merged, index)
        for kind in ("smooth_l1", "cosine"):
            options: dict[str, Any] = dict(kind=kind, beta=1.0, normalize_target=False, save=True)
            launch.loss_forward(x, x, index[None], size[None], **options)
        launch.loss_backward(empty(1, dtype=torch.float32), x, 1e-3, torch.float32)


class FrontEndPassed(Exception):
    """Raised where the first stage behind the front end would begin."""


if __name__ == "__main__":
    with recording("sm_90") as found:
        matching()
        groups_and_losses()
    distinct = {identity(each): each for each in found}
    for each in distinct.values():
        source, options = specialised(each)
        try:
            with mock.patch.object(CUDABackend, "make_ttgir", side_effect=FrontEndPassed):
                triton.compile(source, target=TARGETS["sm_90"], options=options)
            raise AssertionError("no stage follows the front end")
        except FrontEndPassed:
            continue
        except Exception as error:
            ones = [name for name, value in each.arguments.items() if type(value) is int and value == 1]
            raise RuntimeError(f"{each.name} does not compile with {ones} equal to 1") from error
    print(len(distinct))
