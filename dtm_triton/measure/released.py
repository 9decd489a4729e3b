"""The released programs as baselines: their matching functions, loaded from a checkout that the user points to.

Nothing of theirs is part of this library. What surrounds their functions is stated here: the iterations, and the loss,
which both sides take through the dense source matrix. B images, N tokens, C channels, G groups.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtm_triton.dtm import DTMLoss
from dtm_triton.measure.cases import Case, Inputs

FILES = {"tome": "tome/merge.py", "dtm": "bm/merge.py"}
"""Where each program keeps its matching, below the root of a checkout."""

FUNCTIONS = ("bipartite_soft_matching", "merge_wavg", "merge_source")

OPS = {"tome": ("tome_step", "match"), "dtm": ("match", "dtm_loss")}
"""What each program is measured on."""


class NotReleased(Exception):
    """A folder is no checkout of a released program, or not of one with the functions that are needed."""


def load(program: str, checkout: Path) -> ModuleType:
    """The module of "tome" or "dtm" that has the matching functions, from a checkout.

    Raises NotReleased when the file is not there, cannot be imported, or lacks a function.

    >>> load("tome", Path("no such folder"))
    Traceback (most recent call last):
    dtm_triton.measure.released.NotReleased: no such folder/tome/merge.py: not found; --tome takes a checkout's root
    """
    path = checkout / FILES[program]
    if not path.is_file():
        raise NotReleased(f"{path}: not found; --{program} takes a checkout's root")
    spec = importlib.util.spec_from_file_location(f"released_{program}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise NotReleased(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    if missing := [name for name in FUNCTIONS if not callable(getattr(module, name, None))]:
        raise NotReleased(f"{path}: has no function {', '.join(missing)}")
    return module


def released_call(program: str, module: ModuleType, case: Case, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """One call of `case` by a released program; the results are those of `cases.call`, but groups come as the source.

    For a case that the program has no counterpart of, see OPS.
    """
    assert case.op in OPS[program], (program, case.op)
    protected = case.protected > 0
    if case.op == "tome_step":

        def step() -> tuple[Tensor, ...]:
            merge, _ = module.bipartite_soft_matching(inputs.features, case.schedules[0][0], protected, False)
            return module.merge_wavg(merge, inputs.tokens, inputs.weights)

        return step
    if case.op == "match":
        return lambda: (_source(module, inputs.features, case.schedules[0], protected),)

    def loss() -> tuple[Tensor, ...]:
        assert inputs.outputs is not None
        sources = [_source(module, inputs.features, schedule, protected) for schedule in case.schedules]
        losses = [
            F.smooth_l1_loss(_morph(source, inputs.outputs), _morph(source, inputs.features), beta=2.0)
            for source in sources
        ]
        value = torch.stack(losses).mean()
        return value, *torch.autograd.grad(value, inputs.outputs, inputs.grad.to(value.dtype))  # type: ignore[union-attr]

    return loss


class ReleasedLoss(nn.Module):
    """Takes the place of a `DTMLoss` in training: the same draws, the released DTM's matching, dense products.

    ours: settings and draws are its own. module: what `load("dtm", checkout)` gave.
    Raises ValueError for settings that this stands for nothing of: only smooth_l1 between plain targets.
    """

    def __init__(self, ours: DTMLoss, module: ModuleType) -> None:
        super().__init__()
        if ours.kind != "smooth_l1" or ours.normalize_target or ours.split != "alternating":
            raise ValueError(f"ours must be smooth_l1 between plain targets, alternating split, got {ours!r}")
        self.ours, self.module = ours, module

    def manual_seed(self, seed: int) -> ReleasedLoss:
        """Start the draw anew from `seed`; returns the module."""
        self.ours.manual_seed(seed)
        return self

    def match(self, targets: Tensor) -> list[Tensor]:
        """Draw schedules, and which tokens each group holds [B, G, N] for each, from targets [B, N, C]."""
        schedules = [tuple(filter(None, row)) for row in self.ours.draw(targets.shape[1]).tolist()]
        return [_source(self.module, targets.detach(), row, self.ours.num_protected > 0) for row in schedules]

    def forward(self, outputs: Tensor, targets: Tensor, matching: Sequence[Tensor]) -> Tensor:
        """The mean over `matching`, what `match(targets)` gave, of the distance between morphed tokens."""
        losses = [
            F.smooth_l1_loss(_morph(source, outputs), _morph(source, targets), beta=self.ours.beta)
            for source in matching
        ]
        return torch.stack(losses).mean()


def _source(module: ModuleType, features: Tensor, schedule: tuple[int, ...], protected: bool) -> Tensor:
    """Which tokens each group holds [B, G, N], by iterated matching on the groups' means."""
    tokens, source, size = features, None, None
    for count in schedule:
        merge, _ = module.bipartite_soft_matching(tokens, count, protected, False)
        source = module.merge_source(merge, tokens, source)
        tokens, size = module.merge_wavg(merge, tokens, size)
    if source is None:
        source = torch.eye(features.shape[1], dtype=features.dtype, device=features.device).expand(
            len(features), -1, -1
        )
    return source


def _morph(source: Tensor, x: Tensor) -> Tensor:
    """Every token's group mean, by products with the source matrix [B, G, N]."""
    source = source.to(x.dtype)
    return source.transpose(1, 2) @ ((source @ x) / source.sum(-1, keepdim=True))
