"""What objectives share that compare a network's tokens with a teacher's, morphed (DTM) or one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtm_triton.dtm import DTMLoss, Matching
from dtm_triton.losses import dtm_loss
from dtm_triton.partition import Partition
from dtm_triton.schedule import MorphSchedule
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import Normalise
from dtm_triton.train.data.draws import Draw, fold
from dtm_triton.train.data.masks import Masks
from dtm_triton.train.engine.beside import Beside
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.evaluate import knn_accuracy
from dtm_triton.train.models.average import follow, frozen_copy
from dtm_triton.train.models.keeping import take
from dtm_triton.train.objectives.objective import Loader, Objective, gather_features


class TokenObjective(Objective):
    """A network, what it sees masked, where its targets come from, and the distance to them.

    Args:
        network: an `Encoder` with a head.
        teacher: frozen; images [B, C, H, W] in 0..1 -> targets [B, N, C]. None: a moving average of the network.
        config: normalisation of what the network sees (the teacher normalises the same crop itself), masks, loss, ema.
    """

    judged_by = "knn"

    def __init__(self, network: Any, teacher: nn.Module | None, config: PretrainConfig) -> None:
        super().__init__()
        loss = config.loss
        self.network, self.config, self.average = network, loss, config.ema
        self.normalise = Normalise(config.data.mean, config.data.std)
        self.masks, self.attention = Masks(config.mask, network.grid, config.attention), config.attention
        attends = config.mask.kind == "attention"
        self.maps = config.attention if attends and config.attention.maps == "stored" else None
        self.live = attends and self.maps is None
        self.teacher: Any = None
        if teacher is None or (attends and config.attention.source == "ema"):
            self.ema = frozen_copy(network)
        if teacher is not None:
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

    def train(self, mode: bool = True) -> TokenObjective:
        """Teacher and average stay in eval mode."""
        super().train(mode)
        for frozen in (self.teacher, self.ema):
            if frozen is not None:
                frozen.eval()
        return self

    def draws(self) -> Mapping[str, Draw]:
        return {"mask": self.masks.draw}

    def seed_draws(self, seed: int, step: int, rank: int) -> None:
        """The schedules of the next call: equal for all micro-batches of a step."""
        self.loss.manual_seed(fold(seed, "schedules", step, 0 if self.config.shared_schedules else rank))

    def after_step(self, progress: float) -> None:
        """The average follows the network."""
        if self.ema is not None:
            follow(self.ema, self.network, self.average.at(progress))

    def targets(self, images: Tensor) -> Tensor:
        """What the network should predict, [B, N, C], of images [B, C, H, W] in 0..1; without gradient."""
        with torch.no_grad():
            if self.teacher is not None:
                return self.teacher(images)
            return self.ema.tokens(self.normalise(images), average=self.average.blocks)

    @property
    def attended(self) -> nn.Module:
        """The timm model whose last block says where to look."""
        owners = {"student": self.network, "ema": self.ema, "teacher": self.teacher}
        owner: Any = owners[self.attention.source]
        return owner.model if self.attention.source == "teacher" else owner.backbone

    def attend(self, images: Tensor) -> Tensor:
        """What `attention.source` attends to in images [B, C, H, W] in 0..1: [B, N], in eval mode, without gradient."""
        statistic = self.attention.statistic
        with torch.no_grad():
            if self.attention.source == "teacher":
                return self.teacher.attention(images, statistic)
            if self.attention.source == "ema":
                return self.ema.attention(self.normalise(images), statistic)
            return self.network.attention(self.normalise(images), statistic)

    def partition(self, batch: Mapping[str, Tensor], images: Tensor) -> Partition:
        """What of a batch is masked, thrown and visible; images: [B, C, H, W] in 0..1, as the network will see them."""
        return self.masks(batch, self.attend(images) if self._looks_now() else None)

    def look(self, batch: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, Partition]:
        """`targets` and `partition`; a teacher that gives both looks once."""
        if self._looks_now() and self.attention.source == "teacher":
            targets, maps = self.teacher.targets_and_attention(images, self.attention.statistic)
            return targets, self.masks(batch, maps)
        return self.targets(images), self.partition(batch, images)

    def _looks_now(self) -> bool:
        return self.live and self.epoch >= self.attention.warmup_epochs

    def aims(self, targets: Tensor, partition: Partition) -> Tensor:
        """Of targets [B, N, C] those that the loss compares: of kept patches [B, K, C], or of masked ones [B, M, C]."""
        if self.config.on == "masked":
            return take(targets, partition.masked)
        return take(targets, partition.kept) if partition.thrown.shape[1] else targets

    def compared(self, outputs: Tensor, partition: Partition) -> Tensor:
        """Of outputs [B, K, C] those that the loss compares: all, or [B, M, C]."""
        return take(outputs, partition.masked_among_kept) if self.config.on == "masked" else outputs

    def match(self, targets: Tensor) -> Matching | None:
        """Groups of the targets' tokens, found beside the main stream; None when nothing is morphed."""
        return self.beside.start(lambda: self.loss.match(targets), targets.device) if self.config.morph else None

    def distance(self, outputs: Tensor, targets: Tensor, matching: Matching | None) -> Tensor:
        """The loss between outputs and targets [B, N, C], morphed by what `match(targets)` gave; a float32 scalar."""
        if matching is not None:
            return self.loss(outputs, targets, self.beside.join(matching, targets.device))
        alone = MorphSchedule(())  # nothing is removed: every token is its own group
        kind, beta, normalize_target = self.config.kind, self.config.beta, self.config.normalize_target
        return dtm_loss(outputs, targets, alone, kind=kind, beta=beta, normalize_target=normalize_target)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images in 0..1, nothing masked."""
        return self.network.features(self.normalise(images))

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        train_x, train_y = gather_features(self.features, train, processes)
        return {"knn": knn_accuracy(train_x, train_y, *gather_features(self.features, test, processes))}
