"""Configuration of supervised training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtm_triton.train.config.checks import check
from dtm_triton.train.config.data import DataConfig
from dtm_triton.train.config.model import StudentConfig
from dtm_triton.train.config.run import OptimizerConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything about supervised training, from pre-trained or from random weights.

    RandAugment, which published fine-tuning uses too, is not here: it works on single images, in the workers.
    """

    data: DataConfig
    student: StudentConfig
    optimizer: OptimizerConfig
    run: RunConfig
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes equally."""
    pool: Literal["mean", "class"] = "mean"
    """What the classifier reads: the mean of the patch tokens, or the class token."""
    frozen: bool = False
    """Linear probing: only the classifier is trained, on features standardised over the batch (BatchNorm without
    weights, over all processes)."""
    mixup: float = 0.0
    """Images are blended with a neighbour in the batch, by a share from Beta(this, this); 0 does not."""
    cutmix: float = 0.0
    """Rectangles are replaced by the neighbour's, of a size from Beta(this, this); 0 does not. With both, each image
    gets one of the two by chance."""
    random_erasing: float = 0.0
    """Share of the images of which a rectangle is filled with noise."""

    def __post_init__(self) -> None:
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in 0..1")
        for name in ("mixup", "cutmix"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("random_erasing", self.random_erasing, 0 <= self.random_erasing <= 1, "in 0..1")
        if self.mixup or self.cutmix:
            parts = self.run.batch_size // self.run.accumulate
            check("run.batch_size", self.run.batch_size, parts % 2 == 0, "even for mixup and cutmix, which mix pairs")
