"""BYOL with morphed tokens: two views of an image, each predicts what a moving average sees in the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn import functional as F

from dtm_triton.partition import Partition
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.data.draws import Draw
from dtm_triton.train.models.student import ProjectedStudent
from dtm_triton.train.objectives.tokens import TokenObjective

CENTRE_MOMENTUM = 0.9  # DINO's


class Byol(TokenObjective):
    """BYOL's loss on images and DTM's loss on tokens, summed; both views take both parts.

    As in BYOL (arXiv 2006.07733): projector, predictor, a moving average as the target, 2 - 2 cos on image vectors,
    symmetric in the views. Ours: the views are one crop, flipped and jittered differently, so that tokens meet when the
    flip is undone and one crop is decoded; an image's vector is its mean token; patches of the online view are hidden
    as `mask` says (0 hides none). BYOL's BatchNorm, which keeps it from predicting the same for all images, is
    replaced: heads have LayerNorm, and targets lose their running mean, as DINO centres its teacher (2104.14294).

    The batch comes with "view": uniform numbers [B, 4] for the second view's flip and jitter.
    """

    centre: Tensor

    def __init__(self, network: ProjectedStudent, config: PretrainConfig) -> None:
        super().__init__(network, None, config)
        self.flip, self.jitter = config.data.flip, config.data.colour_jitter
        self.register_buffer("centre", torch.zeros(2, config.projector.features))  # of images' vectors, of tokens
        self.seen: list[Tensor] = []  # means since the last step, one for each micro-batch

    def draws(self) -> Mapping[str, Draw]:
        return {**super().draws(), "view": _view}

    def targets(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.ema(self.normalise(images))[1] - self.centre[1]

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        mean = torch.stack(self.seen).mean(0)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.centre.lerp_(mean, 1 - CENTRE_MOMENTUM)
        self.seen.clear()

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        second = self._second(batch)
        images = torch.cat([augment(batch), augment(second)])
        flip = torch.cat([batch["flip"], second["flip"]]) if self.flip else None
        once = self.masks(batch)  # of the unflipped crop, as all that is compared
        both = Partition(*(part.repeat(2, 1) for part in once))
        with torch.no_grad():
            whole, tokens = (part.float() for part in self.ema(self.normalise(images)))
            if self.training:
                self.seen.append(torch.stack([whole.mean(0), tokens.mean((0, 1))]))
            whole, tokens = whole - self.centre[0], tokens - self.centre[1]
            targets = self.aims(_swap(self._mirrored(tokens, flip)), both)
        matching = self.match(targets)
        hidden = Partition.of(self._mirrored(both.mask[..., None], flip)[..., 0], None, both.masked.shape[1])
        vectors, tokens = self.network(self.normalise(images), hidden)
        outputs = self.compared(self._mirrored(tokens, flip), both)
        image_loss = 2 - 2 * F.cosine_similarity(vectors.float(), _swap(whole), dim=-1).mean()
        token_loss = self.distance(outputs, targets, matching)
        return {"loss": image_loss + token_loss, "image_loss": image_loss, "token_loss": token_loss}

    def _second(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        view = {"images": batch["images"]}
        if self.flip:
            view["flip"] = batch["view"][:, 0] < 0.5
        if self.jitter:
            view["jitter"] = 1 + self.jitter * (2 * batch["view"][:, 1:] - 1)
        return view

    def _mirrored(self, tokens: Tensor, flip: Tensor | None) -> Tensor:
        """Tokens [B, N, C] from a flipped view's places to those of the crop, or back; where `flip` [B] is True."""
        if flip is None:
            return tokens
        mirrored = tokens.unflatten(1, self.network.grid).flip(2).flatten(1, 2)
        return torch.where(flip.view(-1, 1, 1), mirrored, tokens)


def _view(count: int, *, generator: Generator) -> Tensor:
    return torch.rand(count, 4, generator=generator)


def _swap(pair: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return pair.roll(len(pair) // 2, 0)
