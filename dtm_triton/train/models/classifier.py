"""A classifier: a timm Vision Transformer and a linear head on its mean token or its class token.

Shapes: images [B, C, H, W], logits [B, classes].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtm_triton.partition import Partition
from dtm_triton.train.models.encoder import Encoder


class Classifier(Encoder):
    """An `Encoder` and a linear head on normed tokens, for fine-tuning and linear probing.

    Arguments as `Encoder`'s; out_features: classes; pool: "mean" of the patch tokens, or the "class" token; frozen: the
    backbone is not trained and stays in eval mode, and the head reads standardised features.

    Raises ValueError as `Encoder`, and for pool "class" with a model that has no class token.

    >>> classifier = Classifier("vit_tiny_patch16_224", out_features=5, pool="class", frozen=True, image_size=12,
    ...                         patch_size=2, model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> classifier(torch.rand(4, 3, 12, 12)).shape
    torch.Size([4, 5])
    >>> [name for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    ['head.weight', 'head.bias']
    """

    def __init__(
        self,
        model: str,
        *,
        out_features: int,
        pool: Literal["mean", "class"] = "mean",
        frozen: bool = False,
        **encoder: Any,
    ) -> None:
        super().__init__(model, **encoder)
        if pool == "class" and getattr(self.backbone, "cls_token", None) is None:
            raise ValueError(f"model must have a class token for pool 'class', got {model!r}")
        self.pool, self.frozen = pool, frozen
        width: int = self.backbone.embed_dim
        self.standardise: nn.Module = Standardise(width) if frozen else nn.Identity()
        self.head = nn.Linear(width, out_features)
        self.init_weights()
        if frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Classifier:
        """A frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, out_features] of images [B, C, H, W]."""
        return self.head(self.standardise(self._pooled(images)))

    def features(self, images: Tensor) -> Tensor:
        """What the head reads, not standardised: [B, D]."""
        return self._pooled(images)

    def _pooled(self, images: Tensor) -> Tensor:
        x = self._encode(images, None)
        return x[:, 0] if self.pool == "class" else x[:, self.backbone.num_prefix_tokens :].mean(dim=1)

    def _encode(self, images: Tensor, partition: Partition | None) -> Tensor:
        return self._run(images, None if partition is None else partition.kept)


class Standardise(nn.Module):
    """Features [B, D] less their mean, over their deviation: of the batch in training, of all batches in evaluation.

    BatchNorm without weights whose batch is that of all processes; what comes in needs no gradient. The running mean
    and variance are the same in all processes.

    >>> standardise = Standardise(2)
    >>> standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).round(decimals=3).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        mean, variance, x = self.mean, self.variance, x.float()
        if self.training:
            rows = x.double()  # a sum of squares keeps its digits
            sums = torch.stack([torch.ones_like(rows), rows, rows.square()]).sum(1)
            if dist.is_initialized():
                dist.all_reduce(sums)
            count, total, squares = sums.unbind()
            mean64 = total / count
            variance64 = (squares / count - mean64.square()).clamp(min=0)
            mean, variance = mean64.float(), variance64.float()
            self.mean.lerp_(mean, self.momentum)
            # of the population that the batch was drawn from, as BatchNorm keeps it
            self.variance.lerp_((variance64 * count / (count - 1).clamp(min=1)).float(), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt()
