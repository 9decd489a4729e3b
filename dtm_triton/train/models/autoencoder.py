"""MAE's network (arXiv 2111.06377): the encoder sees the visible patches only, a light decoder predicts all of them.

Shapes: images [B, C, H, W], mask [B, N] with equally many True in every row, visible tokens [B, V, D].
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dtm_triton.train.models.encoder import Encoder
from dtm_triton.train.models.student import take


class KeepVisible(nn.Module):
    """In the place of a timm model's `patch_drop`: keeps the patches in `places` [B, V], prefix tokens always.

    Models with rotary positions (`Eva`) are also told which patches stay. Nothing is dropped while `places` is None.
    """

    def __init__(self, prefix: int, tell: bool) -> None:
        super().__init__()
        self.prefix, self.tell = prefix, tell
        self.places: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.places is not None:
            x = torch.cat([x[:, : self.prefix], take(x[:, self.prefix :], self.places)], dim=1)
        return (x, self.places) if self.tell else x


class Decoder(nn.Module):
    """Transformer blocks over visible tokens and mask tokens in raster order, with fixed sine-cosine positions.

    Raises ValueError for a width that is no multiple of 4 (positions) and of the heads.

    >>> decoder = Decoder(24, (2, 3), width=16, depth=1, heads=2, out_features=5)
    >>> decoder(torch.rand(4, 2, 24), torch.tensor([[0, 5]]).expand(4, -1)).shape
    torch.Size([4, 6, 5])
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

    def forward(self, visible: Tensor, places: Tensor) -> Tensor:
        """Predictions [B, N, out_features] from the visible tokens [B, V, inputs] and where they lie [B, V]."""
        visible = self.embed(visible)
        hidden = self.mask_token.to(visible.dtype).expand(len(visible), len(self.positions), -1)
        x = hidden.scatter(1, places[..., None].expand_as(visible), visible) + self.positions
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.head(self.norm(x))


class MaskedAutoencoder(Encoder):
    """An `Encoder` without mask token, whose backbone never sees masked patches, and a `Decoder` for all of them.

    The decoder reads patch tokens; MAE's also reads the class token. Arguments as `Encoder`'s; masked: patches masked
    in every image; width, depth, heads: of the decoder; out_features: of the targets, None: the encoder's width.

    Raises ValueError as `Encoder`, and for a model that cannot drop patches (Beit).

    >>> network = MaskedAutoencoder("vit_tiny_patch16_224", masked=27, width=16, depth=1, heads=2, out_features=8,
    ...                             image_size=12, patch_size=2,
    ...                             model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> images, mask = torch.rand(4, 3, 12, 12), (torch.arange(36) % 4 > 0).expand(4, -1)
    >>> network(images, mask).shape, network.tokens(images, mask).shape, network.tokens(images).shape
    (torch.Size([4, 36, 8]), torch.Size([4, 9, 24]), torch.Size([4, 36, 24]))
    """

    not_averaged = ("decoder",)

    def __init__(
        self,
        model: str,
        *,
        masked: int,
        width: int,
        depth: int,
        heads: int,
        out_features: int | None,
        **encoder: Any,
    ) -> None:
        super().__init__(model, **encoder)
        if not hasattr(self.backbone, "patch_drop"):
            raise ValueError(f"model must be able to drop patches (VisionTransformer, Eva), got {model!r}")
        self.visible = self.grid[0] * self.grid[1] - masked
        if self.visible < 1:
            raise ValueError(f"masked must leave patches to see, got {masked} of {self.grid[0] * self.grid[1]}")
        tell = not isinstance(self.backbone.patch_drop, nn.Module)  # Eva has none until it drops
        self.backbone.patch_drop = KeepVisible(self.backbone.num_prefix_tokens, tell)
        inputs: int = self.backbone.embed_dim
        outputs = out_features or inputs
        self.decoder: Any = Decoder(inputs, self.grid, width=width, depth=depth, heads=heads, out_features=outputs)
        self.init_weights()

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predictions [B, N, out_features] for images [B, C, H, W]; patches where mask [B, N] is True are left out."""
        return self.decoder(self._encode(images, mask), self._places(mask))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def _places(self, mask: Tensor) -> Tensor:
        return mask.int().argsort(dim=1, stable=True)[:, : self.visible]

    def _encode(self, images: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            self._check_mask(images, mask)
            self.backbone.patch_drop.places = self._places(mask)
        try:
            return self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        finally:
            self.backbone.patch_drop.places = None
