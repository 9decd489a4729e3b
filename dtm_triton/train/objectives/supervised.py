"""Cross-entropy on labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.train.config import DataConfig
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.data.draws import Draw
from dtm_triton.train.data.erasing import Erasing
from dtm_triton.train.data.mixing import Mixing, neighbours
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.classifier import Classifier
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.objective import Loader, Objective, gather_features


class Supervised(Objective):
    """Cross-entropy on labels: fine-tuning, linear probing, and the demo's teacher.

    Args:
        network: images -> logits; a Classifier sees normalised ones.
        data: image size and normalisation.
        label_smoothing, mixup, cutmix, random_erasing: as in FinetuneConfig. A mixed image has both images' labels, by
            their shares.
    """

    judged_by = "accuracy"

    def __init__(
        self,
        network: Classifier | ConvTeacher,
        data: DataConfig,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.label_smoothing = network, label_smoothing
        plain = isinstance(network, ConvTeacher)
        self.normalise: nn.Module = nn.Identity() if plain else Normalise(data.mean, data.std)
        self.mixing = Mixing(mixup, cutmix, data.image_size) if mixup or cutmix else None
        self.erasing = Erasing(random_erasing, data.image_size) if random_erasing else None

    def draws(self) -> Mapping[str, Draw]:
        chosen = {"mix": self.mixing, "erase": self.erasing}
        return {name: each.draw for name, each in chosen.items() if each is not None}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, labels = self.normalise(augment(batch)), batch["labels"]
        if self.erasing is not None:
            images = self.erasing(images, batch["erase"])
        if self.mixing is None:
            logits = self.network(images)
            loss = self._cross_entropy(logits, labels).mean()
        else:
            images, shares = self.mixing(images, batch["mix"])
            logits, others = self.network(images), neighbours(labels)
            own, other = (self._cross_entropy(logits, each) for each in (labels, others))
            loss = torch.lerp(other, own, shares).mean()
            labels = torch.where(shares < 0.5, others, labels)  # the one that most of the image is
        return {"loss": loss, "train_accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    def logits(self, images: Tensor) -> Tensor:
        """[B, classes] for images in 0..1."""
        return self.network(self.normalise(images))

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        logits, labels = gather_features(self.logits, test, processes)
        return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=self.label_smoothing)
