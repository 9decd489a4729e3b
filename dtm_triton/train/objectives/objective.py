"""Objectives: modules that turn a batch into {"loss": ..., metrics}, and say how good the network has become.

The loop knows nothing more about what is trained. An objective holds the network it trains as `network`, and a frozen
moving average of it as `ema` where it has one; what begins with "teacher." is frozen and in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from dtm_triton.train.config import AttentionConfig
from dtm_triton.train.data.draws import Draw
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.evaluate import extract_features

Loader = DataLoader[tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """What the loop asks of an objective.

    Every trainable parameter takes part in every loss. The network and its average are entered only by calling them or
    their `features` and `tokens`; their transformer blocks lie in lists called `blocks`.
    """

    network: Any
    """What is trained, an nn.Module."""
    ema: Any
    """None, or a frozen moving average of the network: its parameters' names are a subset of the network's."""
    maps: AttentionConfig | None = None
    """When attention maps of all training images are made, by `attend`, and kept for the batches; None: never."""
    epoch: int
    """The one under way, from 0; the loop says it before every step."""
    judged_by: str
    """The metric of `evaluate` that decides which checkpoint is best; higher is better."""

    def __init__(self) -> None:
        super().__init__()
        self.ema, self.epoch = None, 0

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": scalar, further scalars} of a batch on the device."""
        raise NotImplementedError

    def attend(self, images: Tensor) -> Tensor:
        """Attention maps in 0..1 or of any other scale, [B, N], of images [B, C, H, W] in 0..1."""
        raise NotImplementedError

    def draws(self) -> Mapping[str, Draw]:
        """Random numbers that every image of a batch comes with, by their name in the batch."""
        return {}

    def seed_draws(self, seed: int, step: int, rank: int) -> None:
        """Start the objective's own random numbers anew: called before every micro-batch, equal within a step."""

    def after_step(self, progress: float) -> None:
        """Called in all processes after every step of the optimiser; progress is the share of steps done, in (0, 1]."""

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        """Metrics on held-out images; every process holds a share of both loaders."""
        raise NotImplementedError


def gather_features(fn: Callable[[Tensor], Tensor], loader: Loader, processes: Processes) -> tuple[Tensor, Tensor]:
    """`extract_features` of all processes' shares, in every process."""
    features, labels = extract_features(fn, loader, processes.device)
    return processes.gather_rows(features), processes.gather_rows(labels)
