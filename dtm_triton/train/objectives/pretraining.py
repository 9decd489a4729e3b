"""Masked pre-training: predict a teacher's tokens of the whole image from a masked one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dtm_triton.train.data.augment import augment
from dtm_triton.train.objectives.tokens import TokenObjective


class Pretraining(TokenObjective):
    """DTM's loss, or the token-wise one, between what a network predicts from a masked image and a teacher's tokens.

    The network is a `MaskedStudent`, which sees mask tokens (DTM, MaskFeat, data2vec), or a `MaskedAutoencoder`, which
    sees visible patches only (MAE).
    """

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = augment(batch)
        targets, partition = self.look(batch, images)
        targets = self.aims(targets, partition)
        matching = self.match(targets)  # needs no outputs
        outputs = self.network(self.normalise(images), partition)
        return {"loss": self.distance(self.compared(outputs, partition), targets, matching)}
