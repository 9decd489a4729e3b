"""How a timm Vision Transformer is made to see some of its patches only: the others leave before its first block.

Shapes: tokens [B, P + N, D], P prefix tokens first; places [B, K], the patches that stay. L = P + K tokens remain.

What the blocks need of the places reaches them as arguments of their forward, so that a block that is recomputed in
the backward pass, compiled or sharded finds them there. No parameter changes its name.
- `VisionTransformer` has a module for this, `patch_drop`; nothing else depends on places.
- `Eva` has one too, which also says what stayed: its rotary positions follow.
- `Beit` has none: patches leave behind `pos_drop`, and its biases between pairs of places must follow. One that all
  blocks share reaches them as the argument `shared_rel_pos_bias`; where blocks have tables of their own, the places'
  entry in these tables travels there too.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Attention, Beit, RelativePositionBias
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens [B, M, C] of x [B, N, C] at places [B, M].

    >>> take(torch.arange(4.0).view(1, 4, 1), torch.tensor([[2, 0]])).flatten().tolist()
    [2.0, 0.0]
    """
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


class Keep(nn.Module):
    """Keeps the patches in `places` int64 [B, K], and prefix tokens always; all while `places` is None.

    Whoever runs the backbone sets `places` before and takes it away behind.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.places: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.places is None:
            return x
        return torch.cat([x[:, : self.prefix], take(x[:, self.prefix :], self.places)], dim=1)


class KeepAndTell(Keep):
    """As `Eva` wants it: the tokens, and which patches they are."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.places


def keep_patches(backbone: nn.Module) -> Keep | None:
    """Make a timm `VisionTransformer`, `Eva` or `Beit` keep the patches that the returned module is told.

    None for other models: they always see all patches.

    >>> import timm
    >>> small = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 0}
    >>> backbone = timm.create_model("beit_base_patch16_224", **small)
    >>> keep = keep_patches(backbone)
    >>> keep.places = torch.tensor([[0, 7, 15]])
    >>> backbone.forward_features(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 4, 12])
    """
    model: Any = backbone
    if isinstance(backbone, VisionTransformer):
        keep = model.patch_drop = Keep(model.num_prefix_tokens)
    elif isinstance(backbone, Eva):
        keep = model.patch_drop = KeepAndTell(model.num_prefix_tokens)
    elif isinstance(backbone, Beit):
        keep = Keep(model.num_prefix_tokens)
        model.pos_drop = nn.Sequential(model.pos_drop, keep)
        _let_biases_follow(model, keep)
    else:
        return None
    return keep


class SharedBias(RelativePositionBias):
    """timm's bias for all blocks: [heads, L, L], or [B, heads, L, L] of the places that stay."""

    keep: Keep
    tell: bool
    relative_position_index: Tensor

    def forward(self) -> Any:
        if self.keep.places is None:
            return super().forward()
        index = _pairs(self.relative_position_index, self.keep.places)
        bias = _look_up(self.relative_position_bias_table, index)
        return (bias, index) if self.tell else bias


class TellPairs(nn.Module):
    """Where blocks have tables but share no bias: (None, entry of every pair that stays); None when all do."""

    index: Tensor

    def __init__(self, keep: Keep, index: Tensor) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> tuple[None, Tensor] | None:
        return None if self.keep.places is None else (None, _pairs(self.index, self.keep.places))


class FollowingAttention(Attention):
    """timm's attention with a bias table, whose `shared_rel_pos_bias` may be (bias or None, entries [B, L, L])."""

    relative_position_index: Any

    def forward(self, x: Tensor, shared_rel_pos_bias: Any = None) -> Tensor:
        shared, index = shared_rel_pos_bias, self.relative_position_index[None]
        if isinstance(shared_rel_pos_bias, tuple):
            shared, index = shared_rel_pos_bias
        bias = _look_up(self.relative_position_bias_table, index)
        return super().forward(x, bias if shared is None else bias + shared)

    def _get_rel_pos_bias(self) -> Any:
        return 0.0  # forward has added it to the shared one


def _let_biases_follow(model: Any, keep: Keep) -> None:
    # all blocks have tables, or none; a class is exchanged so that names of weights and buffers stay
    tables = [block.attn for block in model.blocks if block.attn.relative_position_bias_table is not None]
    for attention in tables:
        attention.__class__ = FollowingAttention
    if model.rel_pos_bias is not None:
        model.rel_pos_bias.__class__ = SharedBias
        model.rel_pos_bias.keep, model.rel_pos_bias.tell = keep, bool(tables)
    elif tables:
        model.rel_pos_bias = TellPairs(keep, tables[0].relative_position_index.clone())


def _pairs(index: Tensor, places: Tensor) -> Tensor:
    """Of index [1 + N, 1 + N], the class token first, the rows and columns of the class token and of `places`."""
    stay = F.pad(places + 1, (1, 0))
    return index[stay[:, :, None], stay[:, None, :]]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Biases [B, heads, L, L] of entries [B, L, L] of a table [entries, heads]."""
    return F.embedding(index, table).permute(0, 3, 1, 2).contiguous()
