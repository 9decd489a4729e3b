"""MAE's network (arXiv 2111.06377): the encoder sees the visible patches only, a light decoder predicts the others.

Shapes: images [B, C, H, W], visible tokens [B, P + V, D], P prefix tokens first; K = M + V patches are kept, all N
unless some are thrown. Neither encoder nor decoder ever meets a thrown one.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dtm_triton.partition import Partition
from dtm_triton.train.models.encoder import Encoder


class Decoder(nn.Module):
    """Transformer blocks over visible tokens and mask tokens in raster order, with fixed sine-cosine positions.

    The encoder's prefix tokens come first and have no position.

    Raises ValueError for a width that is no multiple of 4 (positions) and of the heads.

    >>> decoder = Decoder(24, (2, 3), width=16, depth=1, heads=2, out_features=5)
    >>> masked, thrown = (torch.tensor([[place in each for place in range(6)]] * 4) for each in ([1, 2], [4]))
    >>> decoder(torch.rand(4, 1 + 3, 24), Partition.of(masked, thrown, 2, 1)).shape
    torch.Size([4, 5, 5])
    """

    positions: Tensor

    def __init__(
        self, inputs: int, grid: tuple[int, int], *, width: int, depth: int, heads: int, out_features: int
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"decoder.width must be a multiple of 4 and of decoder.heads {heads}, got {width}")
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_features)
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, partition: Partition) -> Tensor:
        """Predictions [B, K, out_features] of the kept patches from the tokens [B, P + V, inputs] of visible ones."""
        x = self.embed(tokens)
        num_visible = partition.visible.shape[1]
        prefix, visible = x.split([x.shape[1] - num_visible, num_visible], dim=1)
        num_kept = num_visible + partition.masked.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), num_kept, -1)
        patches = hidden.scatter(1, partition.visible_among_kept[..., None].expand_as(visible), visible)
        patches = patches + (self.positions[partition.kept] if partition.thrown.shape[1] else self.positions)
        x = torch.cat([prefix.to(patches.dtype), patches], dim=1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.head(self.norm(x[:, prefix.shape[1] :]))


class MaskedAutoencoder(Encoder):
    """An `Encoder` without mask token, whose backbone sees visible patches only, and a `Decoder` for all that is kept.

    Arguments as `Encoder`'s; width, depth, heads: of the decoder; out_features: of the targets, None: the encoder's
    width.

    Raises ValueError as `Encoder`, and for a model that cannot leave patches (neither VisionTransformer, Eva nor Beit).

    >>> network = MaskedAutoencoder("vit_tiny_patch16_224", width=16, depth=1, heads=2, out_features=8,
    ...                             image_size=12, patch_size=2,
    ...                             model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> masked, thrown = ((torch.arange(36) % 4 == each).expand(4, -1) for each in (0, 2))
    >>> images, partition = torch.rand(4, 3, 12, 12), Partition.of(masked, thrown, 9, 9)
    >>> network(images, partition).shape, network.tokens(images, partition).shape, network.tokens(images).shape
    (torch.Size([4, 27, 8]), torch.Size([4, 18, 24]), torch.Size([4, 36, 24]))
    """

    not_averaged = ("decoder",)

    def __init__(
        self, model: str, *, width: int, depth: int, heads: int, out_features: int | None, **encoder: Any
    ) -> None:
        super().__init__(model, **encoder)
        if self.keep is None:
            raise ValueError(f"model must be able to leave patches (VisionTransformer, Eva, Beit), got {model!r}")
        inputs: int = self.backbone.embed_dim
        outputs = out_features or inputs
        self.decoder: Any = Decoder(inputs, self.grid, width=width, depth=depth, heads=heads, out_features=outputs)
        self.init_weights()

    def forward(self, images: Tensor, partition: Partition) -> Tensor:
        """Predictions [B, K, out_features] of the kept patches of images [B, C, H, W], in raster order."""
        return self.decoder(self._encode(images, partition), partition)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def _encode(self, images: Tensor, partition: Partition | None) -> Tensor:
        if partition is None:
            return self._run(images, None)
        self._check_partition(images, partition)
        if not partition.visible.shape[1]:
            raise ValueError(f"partition must leave patches to see, got none of {partition.patches}")
        return self._run(images, partition.visible)
