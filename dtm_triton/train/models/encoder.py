"""The part of every network that is kept: an unmodified timm Vision Transformer, its tokens, its weights by name.

Shapes: images [B, C, H, W], tokens [B, N, D] with N = h * w patches of the grid, or [B, K, D] of those that are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.partition import Partition
from dtm_triton.train.models.attention import Statistic, attention_map
from dtm_triton.train.models.keeping import keep_patches

HEADS = ("head.", "lm_head.", "cls_pt_layers.")  # what classifiers and BEiT's pre-training add to the backbone
MASK_TOKEN = "patch_embed.mask_token"


class Encoder(nn.Module):
    """A timm `VisionTransformer`, `Beit` or `Eva` as `backbone`; what is trained adds a head to it.

    The model is built without classifier and pooling, so that its final norm acts on every token and each parameter
    takes part in pre-training. Networks are entered by calling them, `tokens`, `features` or `attention`;
    none of these calls another, so that a sharded network gathers its weights once.

    Args:
        model: timm model name, for example "beit_base_patch16_224" or "vit_tiny_patch16_224".
        image_size: pixels, one number or (height, width), multiples of `patch_size`.
        patch_size: pixels a side.
        in_chans: image channels.
        drop_path: stochastic depth of the last block, 0..1.
        positions: "learned" as the model has them, or "sincos": fixed sines and cosines as MAE, 0 for prefix tokens.
        model_kwargs: further timm arguments (embed_dim, depth, num_heads, init_values, use_shared_rel_pos_bias, ...).

    Raises:
        ValueError: an unknown model, one that is not a plain ViT, a size that is no multiple of the patch, arguments
            the encoder sets itself, or ones that break the grid of tokens; no table for fixed positions, or a
            width that is no multiple of 4.
    """

    backbone: Any  # a timm model: what it offers is checked when it is built
    not_averaged: tuple[str, ...] = ()
    """Parts that a moving average of the network does not need."""

    def __init__(
        self,
        model: str,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int = 3,
        drop_path: float = 0.0,
        positions: Literal["learned", "sincos"] = "learned",
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sizes) != 2 or any(size < 1 or size % patch_size for size in sizes):
            raise ValueError(f"image_size must be positive multiples of patch_size {patch_size!r}, got {image_size!r}")
        self.model_name = model
        self.create_kwargs: dict[str, Any] = {
            **_check_model(model, model_kwargs or {}),
            "img_size": sizes,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "num_classes": 0,
            "global_pool": "",
        }
        try:
            backbone: Any = timm.create_model(model, drop_path_rate=drop_path, **self.create_kwargs)
        except (AssertionError, TypeError) as refusal:
            raise ValueError(f"timm cannot build model {model!r} as a student: {refusal}") from refusal
        _check_backbone(model, backbone)
        self.backbone = backbone
        self.keep = keep_patches(backbone)
        self.fixed_positions = positions == "sincos"
        if self.fixed_positions:
            _fix_positions(model, backbone)

    def init_weights(self) -> None:
        """Truncated-normal 0.02 for weights and tokens, zero biases, block outputs divided by sqrt(2 l).

        What is frozen stays.

        Source: BEiT (arXiv 2106.08254) and DTM (2401.00254).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("_token", "pos_embed")) and parameter.requires_grad:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for layer, block in enumerate(self.backbone.blocks, start=1):
                for name, parameter in block.named_parameters():
                    if name in ("attn.proj.weight", "mlp.fc2.weight"):
                        parameter.div_(math.sqrt(2 * layer))

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in patches."""
        height, width = self.backbone.patch_embed.grid_size
        return int(height), int(width)

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the backbone."""
        return len(self.backbone.blocks)

    def tokens(self, images: Tensor, partition: Partition | None = None, *, average: int = 0) -> Tensor:
        """The backbone's normed patch tokens [B, N, D]; class and register tokens are dropped.

        partition: of the patches that the network keeps, in raster order, [B, K, D]; None: nothing is masked.
        average: with a number (and no partition), instead the mean of so many last blocks' outputs, every token
        standardised over its channels before and after: data2vec's targets (arXiv 2202.03555).
        """
        if average == 0:
            return self._patches(images, partition)
        layers = self.backbone.forward_intermediates(images, indices=average, output_fmt="NLC", intermediates_only=True)
        width = layers[0].shape[-1:]
        return F.layer_norm(torch.stack([F.layer_norm(layer.float(), width) for layer in layers]).mean(0), width)

    def features(self, images: Tensor) -> Tensor:
        """One vector per image [B, D]: the mean of the normed patch tokens, nothing masked."""
        return self._patches(images, None).mean(dim=1)

    def attention(self, images: Tensor, statistic: Statistic = "class_row") -> Tensor:
        """How much the last block attends to every patch, nothing masked: see `attention_map`."""
        return attention_map(self.backbone, images, statistic)

    def _patches(self, images: Tensor, partition: Partition | None) -> Tensor:
        return self._encode(images, partition)[:, self.backbone.num_prefix_tokens :]

    def _encode(self, images: Tensor, partition: Partition | None) -> Tensor:
        """Normed tokens, prefix tokens first, of all patches or of those that the network lets the backbone see."""
        raise NotImplementedError

    def _run(self, images: Any, places: Tensor | None) -> Tensor:
        """Normed tokens, prefix tokens first, of the patches in places [B, K]; None: of all."""
        if places is None:
            return self.backbone.forward_features(images)
        if self.keep is None:
            raise ValueError(
                f"model must be a VisionTransformer, Eva or Beit to leave patches, got {self.model_name!r}"
            )
        self.keep.places = places
        try:
            return self.backbone.forward_features(images)
        finally:
            self.keep.places = None

    def _check_partition(self, images: Tensor, partition: Partition) -> None:
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a Partition, got {type(partition).__name__}")
        patches, found = self.grid[0] * self.grid[1], [list(part.shape) for part in partition]
        if partition.patches != patches or any(shape[0] != images.shape[0] for shape in found):
            raise ValueError(f"partition must be of {images.shape[0]} images and {patches} patches, got {found}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass: less memory, more time."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the tokens and position tables, among `named_parameters()`, that should not decay."""
        own = {"backbone." + name for name in self.backbone.no_weight_decay()}
        tables = ("_token", "pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name in own or name.endswith(tables)}

    def layer_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for all before the blocks, num_blocks + 1 behind them.

        Raises ValueError for a name that is none of `named_parameters()`.
        """
        try:
            self.get_parameter(name)
        except AttributeError:
            raise ValueError(f"name must be one of the student's parameters, got {name!r}") from None
        if not name.startswith("backbone.") or name.startswith("backbone.norm."):
            return self.num_blocks + 1
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else 0

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The backbone's weights under plain timm names: no mask token, no head; loads strictly into the same model."""
        state = self.backbone.state_dict()
        state.pop(MASK_TOKEN, None)
        return {name.replace("patch_embed.embed.", "patch_embed.", 1): value for name, value in state.items()}

    def load_backbone_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Start from public weights under timm's or BEiT's names, strictly: every other name and shape must fit.

        Classifiers and pre-training heads are left out; a mask token is taken when there is one. Models pooled by mean
        keep their final norm under `fc_norm`; it is taken as the final norm.

        Raises ValueError naming what does not fit.
        """
        own = self.backbone.state_dict()
        wrapped = MASK_TOKEN in own
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.startswith(HEADS) or name == "mask_token" or name.endswith("relative_position_index"):
                continue
            name = re.sub(r"^fc_norm\.", "norm.", name)
            renamed[re.sub(r"^patch_embed\.", "patch_embed.embed.", name) if wrapped else name] = value
        if wrapped:
            renamed[MASK_TOKEN] = state.get("mask_token", own[MASK_TOKEN]).flatten()
        if self.fixed_positions and not _alike(renamed.get("pos_embed"), own["pos_embed"]):
            raise ValueError("state holds other positions than the student's fixed ones: positions must be 'learned'")
        try:
            self.backbone.load_state_dict(renamed, strict=True)
        except RuntimeError as misfit:
            raise ValueError(f"state does not fit student {self.model_name!r}: {misfit}") from misfit


def _alike(table: Tensor | None, own: Tensor) -> bool:
    """Whether a table of positions is the own one; one that does not fit at all is another matter."""
    return table is None or table.shape != own.shape or torch.allclose(table.to(own), own, atol=1e-3)


def _check_model(model: str, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not timm.is_model(model):
        raise ValueError(f"model must be the name of a timm model (see timm.list_models()), got {model!r}")
    owned = {"img_size", "patch_size", "in_chans", "num_classes", "global_pool", "drop_path_rate", "pretrained"}
    taken = sorted(owned & set(model_kwargs))
    if taken:
        raise ValueError(f"model_kwargs must not hold what the student sets itself, got {taken}")
    if model_kwargs.get("patch_drop_rate"):
        raise ValueError(f"patch_drop_rate in model_kwargs must be 0, got {model_kwargs['patch_drop_rate']!r}")
    return dict(model_kwargs)


def _check_backbone(model: str, backbone: Any) -> None:
    missing = [name for name in ("patch_embed", "blocks", "norm", "num_prefix_tokens") if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f"model must be a plain Vision Transformer, got {model!r} without {', '.join(missing)}")
    if isinstance(backbone.norm, nn.Identity) or any(True for _ in backbone.fc_norm.parameters()):
        raise ValueError(
            f"model must norm its tokens, not their mean: {model!r} needs fc_norm=False (VisionTransformer) or "
            "use_fc_norm=False (Beit, Eva) in model_kwargs"
        )


def _fix_positions(model: str, backbone: Any) -> None:
    # up to the order of channels those of MAE
    table, grid = backbone.pos_embed, [int(side) for side in backbone.patch_embed.grid_size]
    if table is None:
        raise ValueError(
            f"positions must be 'learned' for a model without a table of positions, got 'sincos', {model!r}"
        )
    if table.shape[-1] % 4:
        raise ValueError(f"positions 'sincos' need a width that is a multiple of 4, got {table.shape[-1]}")
    fixed = build_sincos2d_pos_embed(grid, table.shape[-1])
    with torch.no_grad():
        table.copy_(F.pad(fixed, (0, 0, table.shape[1] - len(fixed), 0)))
    table.requires_grad_(False)
