"""Objectives: modules that turn a batch into {"loss": ..., metrics}, and say how good the network has become.

The loop knows nothing more about what is trained. An objective holds the network it trains as `network`; what begins
with "teacher." is frozen and in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dtm_triton.dtm import DTMLoss
from dtm_triton.losses import dtm_loss
from dtm_triton.schedule import MorphSchedule
from dtm_triton.train.augment import Normalise, augment
from dtm_triton.train.beside import Beside
from dtm_triton.train.config import DataConfig, LossConfig
from dtm_triton.train.distributed import Processes
from dtm_triton.train.draws import fold
from dtm_triton.train.evaluate import extract_features, knn_accuracy
from dtm_triton.train.student import MaskedStudent
from dtm_triton.train.teacher import ConvTeacher

Loader = DataLoader[tuple[Tensor, Tensor]]


class Objective(nn.Module):
    """What the loop asks of an objective."""

    network: Any
    """What is trained, an nn.Module."""
    judged_by: str
    """The metric of `evaluate` that decides which checkpoint is best; higher is better."""

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": scalar, further scalars} of a batch on the device."""
        raise NotImplementedError

    def seed_draws(self, seed: int, step: int, rank: int) -> None:
        """Start the objective's own random numbers anew: called before every micro-batch, equal within a step."""

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        """Metrics on held-out images; every process holds a share of both loaders."""
        raise NotImplementedError


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


class Supervised(Objective):
    """Cross-entropy on labels: fine-tuning, and the demo's teacher.

    A MaskedStudent is used as a classifier: its head, as wide as there are classes, reads the mean token.
    """

    judged_by = "accuracy"

    def __init__(self, network: MaskedStudent | ConvTeacher, data: DataConfig, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.network, self.label_smoothing = network, label_smoothing
        self.normalise = Normalise(data.mean, data.std)
        if isinstance(network, MaskedStudent):
            network.backbone.patch_embed.mask_token.requires_grad_(False)  # nothing is masked here

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = self.logits(augment(batch)), batch["labels"]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss, "train_accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    def logits(self, images: Tensor) -> Tensor:
        """[B, classes] for images in 0..1."""
        if isinstance(self.network, ConvTeacher):
            return self.network(images)
        return self.network.head(self.network.features(self.normalise(images)))

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        logits, labels = gather_features(self.logits, test, processes)
        return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}


def gather_features(fn: Callable[[Tensor], Tensor], loader: Loader, processes: Processes) -> tuple[Tensor, Tensor]:
    """`extract_features` of all processes' shares, in every process."""
    features, labels = extract_features(fn, loader, processes.device)
    return processes.gather_rows(features), processes.gather_rows(labels)
