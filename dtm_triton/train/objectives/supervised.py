"""Cross-entropy on labels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from dtm_triton.train.config import DataConfig
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.student import MaskedStudent
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.objective import Loader, Objective, gather_features


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
        return self.network.classify(self.normalise(images))

    def evaluate(self, train: Loader, test: Loader, processes: Processes) -> dict[str, float]:
        logits, labels = gather_features(self.logits, test, processes)
        return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}
