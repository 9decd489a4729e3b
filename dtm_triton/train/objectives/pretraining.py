"""Masked pre-training on a teacher's tokens, morphed (DTM) or token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtm_triton.dtm import DTMLoss
from dtm_triton.losses import dtm_loss
from dtm_triton.schedule import MorphSchedule
from dtm_triton.train.config import DataConfig, LossConfig
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.data.draws import fold
from dtm_triton.train.engine.beside import Beside
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.evaluate import knn_accuracy
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.objectives.objective import Loader, Objective, gather_features


class Pretraining(Objective):
    """Predict a frozen teacher's tokens from a masked image, morphed (DTM) or token by token.

    Args:
        student: predicts [B, N, C].
        teacher: frozen; images [B, 3, H, W] in 0..1 -> targets [B, N, C].
        data: normalisation of what the student sees. The teacher normalises the same crop itself.
        loss: the distance, and how targets are morphed.
    """

    judged_by = "knn"

    def __init__(self, student: MaskedStudent, teacher: nn.Module, data: DataConfig, loss: LossConfig) -> None:
        super().__init__()
        self.network, self.config = student, loss
        self.normalise = Normalise(data.mean, data.std)
        self.teacher = teacher.requires_grad_(False).eval()
        self.beside = Beside()
        self.loss = DTMLoss(
            num_schedules=loss.num_schedules,
            max_removed=loss.max_removed,
            max_iterations=loss.max_iterations,
            kind=loss.kind,
            beta=loss.beta,
            normalize_target=loss.normalize_target,
            num_protected=loss.num_protected,
            split=loss.split,
        )

    def train(self, mode: bool = True) -> Pretraining:
        """The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def seed_draws(self, seed: int, step: int, rank: int) -> None:
        """The schedules of the next call: equal for all micro-batches of a step."""
        self.loss.manual_seed(fold(seed, "schedules", step, 0 if self.config.shared_schedules else rank))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = augment(batch)
        with torch.no_grad():
            targets = self.teacher(images)
        if self.config.morph:  # matching needs the teacher only
            matching = self.beside.start(lambda: self.loss.match(targets), targets.device)
        outputs = self.network(self.normalise(images), batch["mask"])
        if self.config.morph:
            return {"loss": self.loss(outputs, targets, self.beside.join(matching, targets.device))}
        alone = MorphSchedule(())  # nothing is removed: every token is its own group
        kind, beta, normalize_target = self.config.kind, self.config.beta, self.config.normalize_target
        return {"loss": dtm_loss(outputs, targets, alone, kind=kind, beta=beta, normalize_target=normalize_target)}

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images in 0..1, nothing masked."""
        return self.network.features(self.normalise(images))

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        train_x, train_y = gather_features(self.features, train, processes)
        return {"knn": knn_accuracy(train_x, train_y, *gather_features(self.features, test, processes))}
