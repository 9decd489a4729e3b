"""The student: an unmodified timm Vision Transformer that sees a masked image and predicts one feature per patch.

Shapes: images [B, C, H, W], N = h * w patches of the grid, tokens [B, K, D] and outputs [B, K, out_features] of the
K patches that are kept, in raster order: all N unless some are thrown.

The mask token lives in a module around the model's `patch_embed`. The mask travels with the images, as the pair
`(images, mask)` that `forward_features` hands to `patch_embed` untouched. Thrown patches leave behind the position
embedding (`keeping`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dtm_triton.groups import TokenGroups, morph_tokens
from dtm_triton.partition import Partition
from dtm_triton.train.models.encoder import Encoder
from dtm_triton.train.models.keeping import take


class MaskedPatchEmbed(nn.Module):
    """A timm patch embedding whose masked patches are replaced by one learned token.

    Takes images, or `(images, mask)` with mask bool [B, N]. Everything else a timm model asks of its patch embedding
    (grid size, patch size, resizing) is answered by the wrapped one.
    """

    def __init__(self, embed: nn.Module, features: int) -> None:
        super().__init__()
        self.embed = embed
        self.mask_token = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return self.embed(x)
        images, mask = x
        tokens = self.embed(images)
        # models that resize on the fly keep the grid: [B, h, w, D] instead of [B, N, D]
        where = mask.reshape(*tokens.shape[:-1], 1)
        return torch.where(where, self.mask_token.to(tokens.dtype), tokens)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("embed"), name)


class MaskedStudent(Encoder):
    """An `Encoder` with a mask token and a linear head on its normed patch tokens.

    Arguments as `Encoder`'s; out_features: width of the teacher's tokens, None: of its own. Linear and convolution
    weights and all tokens start truncated-normal with deviation 0.02, the output weights of block l = 1.. divided by
    sqrt(2 l).

    >>> student = MaskedStudent("vit_tiny_patch16_224", out_features=8, image_size=12, patch_size=2,
    ...                         model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> masked, thrown = ((torch.arange(36) % 4 == each).expand(4, -1) for each in (0, 2))
    >>> student.grid, student(torch.rand(4, 3, 12, 12), Partition.of(masked, thrown, 9, 9)).shape
    ((6, 6), torch.Size([4, 27, 8]))
    >>> student.features(torch.rand(4, 3, 12, 12)).shape
    torch.Size([4, 24])
    """

    not_averaged = ("head",)

    def __init__(self, model: str, *, out_features: int | None, **encoder: Any) -> None:
        super().__init__(model, **encoder)
        width = self.backbone.embed_dim
        self.backbone.patch_embed = MaskedPatchEmbed(self.backbone.patch_embed, width)
        self.head: nn.Module = nn.Linear(width, out_features or width)
        self.init_weights()

    def forward(self, images: Tensor, partition: Partition | None = None) -> Tensor:
        """Predictions [B, K, out_features] for images [B, C, H, W]: masked patches are hidden, thrown ones leave."""
        return self.head(self._patches(images, partition))

    def _encode(self, images: Tensor, partition: Partition | None) -> Tensor:
        if partition is None:
            return self._run(images, None)
        self._check_partition(images, partition)
        return self._run((images, partition.mask), partition.kept if partition.thrown.shape[1] else None)


class CodeStudent(MaskedStudent):
    """A `MaskedStudent` whose head, as wide as there are codes, reads morphed tokens.

    A linear head commutes with morphing, so that only the tokens asked for are spread over the codes.

    >>> student = CodeStudent("vit_tiny_patch16_224", out_features=50, image_size=12, patch_size=2,
    ...                       model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> partition = Partition.of((torch.arange(36) < 9).expand(4, -1), None, 9)
    >>> whole = TokenGroups(torch.zeros(4, 36).int(), torch.full((4, 1), 36).int())
    >>> student(torch.rand(4, 3, 12, 12), partition, [whole, whole]).shape
    torch.Size([2, 4, 9, 50])
    """

    def forward(  # type: ignore[override]
        self, images: Tensor, partition: Partition, groups: list[TokenGroups]
    ) -> Tensor:
        """Logits [L, B, M, codes] of the masked patches, morphed by each of L groupings of the kept ones."""
        tokens = self._patches(images, partition)
        places = partition.masked_among_kept
        return self.head(torch.stack([take(morph_tokens(tokens, each), places) for each in groups]))


class ProjectedStudent(MaskedStudent):
    """BYOL's networks (arXiv 2006.07733) on a masked image: projector and predictor, for the image and every token.

    An image's vector is its mean token. Both heads are two-layer perceptrons with LayerNorm where BYOL has BatchNorm:
    images of a batch do not meet. A moving average has no predictor: it gives projections.

    Arguments as `Encoder`'s; hidden and out_features: widths of the heads.

    >>> student = ProjectedStudent("vit_tiny_patch16_224", hidden=32, out_features=8, image_size=12, patch_size=2,
    ...                            model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> whole, tokens = student(torch.rand(4, 3, 12, 12))
    >>> whole.shape, tokens.shape
    (torch.Size([4, 8]), torch.Size([4, 36, 8]))
    """

    not_averaged = ("predictor",)

    def __init__(self, model: str, *, hidden: int, out_features: int, **encoder: Any) -> None:
        super().__init__(model, out_features=1, **encoder)
        self.head = _perceptron(self.backbone.embed_dim, hidden, out_features)
        self.predictor: nn.Module = _perceptron(out_features, hidden, out_features)
        self.init_weights()

    def forward(  # type: ignore[override]
        self, images: Tensor, partition: Partition | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of images [B, C, H, W]: vectors [B, out_features] and tokens [B, K, out_features]."""
        tokens = self._patches(images, partition)
        return self.predictor(self.head(tokens.mean(1))), self.predictor(self.head(tokens))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))
