"""How much the last block of a timm Vision Transformer attends to every patch of an image.

Shapes: images [B, C, H, W], N patches behind P prefix tokens (class, registers), L = P + N, A heads of d channels.
One row of attention is computed from its query and all keys: no L x L weights, and the rest of the block does not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from dtm_triton.train.evaluate import evaluating

Statistic = Literal["class_row", "row_column"]

ROWS = 64  # queries at a time for the attention that patches receive


@torch.no_grad()
def attention_map(backbone: nn.Module, images: Tensor, statistic: Statistic = "class_row") -> Tensor:
    """Attention of a timm `VisionTransformer`, `Eva` or `Beit` in eval mode, float32 [B, N], without gradient.

    Args:
        backbone: of two blocks or more; may be compiled by blocks or sharded (then inside a forward of the root).
        images: [B, C, H, W], normalised.
        statistic: "class_row": the class token's attention to the patches, scaled to 0..1 in every head (constant
            heads become 0), mean over heads. "row_column": in every head that row times the mean attention that a patch
            receives from all tokens, mean over heads, not scaled. Without a class token the row's query is the mean
            of the patches' queries.

    Raises:
        ValueError: another model, one block only, another `statistic`.

    Source: AMT (arXiv 2211.15362).

    >>> import timm
    >>> small = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3}
    >>> maps = attention_map(timm.create_model("vit_tiny_patch16_224", **small), torch.rand(5, 3, 8, 8))
    >>> maps.shape, bool((maps >= 0).all() and (maps <= 1).all())
    (torch.Size([5, 16]), True)
    """
    model = check_attends(backbone, statistic)
    with evaluating(model):
        tokens = _last_input(model, images)
        with _gathered(model.blocks[-1]):
            return _statistic(model, tokens, _rotation(model, images), statistic)


@torch.no_grad()
def tokens_and_attention(
    backbone: nn.Module, images: Tensor, statistic: Statistic = "class_row"
) -> tuple[Tensor, Tensor]:
    """What `backbone.forward_features` gives in eval mode, [B, L, D], and `attention_map`, in one pass.

    Arguments and errors are those of `attention_map`; sharded backbones are not for this.

    >>> import timm
    >>> small = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3}
    >>> tokens, maps = tokens_and_attention(timm.create_model("vit_tiny_patch16_224", **small), torch.rand(5, 3, 8, 8))
    >>> tokens.shape, maps.shape
    (torch.Size([5, 17, 12]), torch.Size([5, 16]))
    """
    model = check_attends(backbone, statistic)
    with evaluating(model):
        tokens, rotation = _last_input(model, images), _rotation(model, images)
        maps = _statistic(model, tokens, rotation, statistic)
        beside: dict[str, Any] = {}
        if isinstance(model, Eva):
            beside["rope"] = rotation
        elif isinstance(model, Beit) and model.rel_pos_bias is not None:
            beside["shared_rel_pos_bias"] = model.rel_pos_bias()
        return model.norm(model.blocks[-1](tokens, **beside)), maps


def check_attends(backbone: Any, statistic: str = "class_row") -> Any:
    """The backbone. Raises ValueError as `attention_map`."""
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic must be one of {get_args(Statistic)}, got {statistic!r}")
    if not isinstance(backbone, VisionTransformer | Eva | Beit):
        raise ValueError(f"backbone must be a VisionTransformer, Eva or Beit, got {type(backbone).__name__}")
    last = backbone.blocks[-1]
    if not isinstance(getattr(last, "attn", None), Attention | AttentionRope | EvaAttention | BeitAttention):
        raise ValueError(f"backbone must have blocks with one plain attention, got {type(last).__name__}")
    if len(backbone.blocks) < 2:
        raise ValueError("backbone must have two blocks or more for attention maps, got 1")
    return backbone


@contextmanager
def _gathered(block: nn.Module) -> Iterator[None]:
    """Sharded weights are gathered by a forward, which the last block does not run."""
    if not isinstance(block, FSDPModule):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()


def _last_input(model: Any, images: Tensor) -> Tensor:
    """What the last block takes, [B, L, D]."""
    split = model.num_prefix_tokens > 0
    found = model.forward_intermediates(
        images,
        indices=[len(model.blocks) - 2],
        return_prefix_tokens=split,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    return torch.cat([found[1], found[0]], dim=1) if split else found


def _rotation(model: Any, images: Tensor) -> Tensor | None:
    """The last block's rotary positions of the patches, or None."""
    if getattr(model, "rope", None) is None:
        return None
    rotation = model.rope.get_embed(shape=list(model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))))
    return rotation[-1] if getattr(model, "rope_mixed", False) else rotation  # mixed: one for each block


def _statistic(model: Any, tokens: Tensor, rotation: Tensor | None, statistic: Statistic) -> Tensor:
    block, prefix = model.blocks[-1], model.num_prefix_tokens
    attention, has_class = block.attn, model.cls_token is not None
    x = tokens if isinstance(block, ResPostBlock | EvaBlockPostNorm) else block.norm1(tokens)
    alone = has_class and statistic == "class_row"  # of all queries only the class token's, which has no position
    query = _heads(attention, x[:, :1] if alone else x, 0)
    query = query if alone else _rotated(query, rotation, attention)
    key = _rotated(_heads(attention, x, 1), rotation, attention)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # heads may share keys
    bias = _bias(model, query.shape[2])
    first = query[:, :, :1] if has_class else query[:, :, prefix:].mean(dim=2, keepdim=True)
    row = _weights(first, key, attention.scale, None if bias is None else bias[:, :1])[:, :, 0, prefix:]
    if statistic == "class_row":
        low, high = row.amin(dim=-1, keepdim=True), row.amax(dim=-1, keepdim=True)
        return ((row - low) / torch.where(high > low, high - low, 1)).mean(dim=1)
    received = torch.zeros_like(row)
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        part = _weights(query[:, :, rows], key, attention.scale, None if bias is None else bias[:, rows])
        received += part[..., prefix:].sum(dim=2)
    return (row * received / query.shape[2]).mean(dim=1)


def _heads(attention: Any, x: Tensor, which: int) -> Tensor:
    """Queries (0) or keys (1) of tokens x [B, L, D], normed: [B, A, L, d]."""
    if getattr(attention, "qkv", None) is None:
        projected = (attention.k_proj if which else attention.q_proj)(x)
        size = attention.q_proj.weight.shape[0] // attention.num_heads
    else:
        apart = getattr(attention, "q_bias", None)  # keys have none then
        bias = attention.qkv.bias if apart is None else torch.cat([apart, torch.zeros_like(apart).repeat(2)])
        weight = attention.qkv.weight.chunk(3)[which]
        projected = F.linear(x, weight, None if bias is None else bias.chunk(3)[which])
        size = weight.shape[0] // attention.num_heads
    heads = projected.unflatten(-1, (-1, size)).transpose(1, 2)
    norm = getattr(attention, "k_norm" if which else "q_norm", None)
    return heads if norm is None else norm(heads)


def _rotated(heads: Tensor, rotation: Tensor | None, attention: Any) -> Tensor:
    if rotation is None:
        return heads
    prefix = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    turned = apply_rot_embed_cat(heads[:, :, prefix:], rotation, half=half)
    return torch.cat([heads[:, :, :prefix], turned.to(heads.dtype)], dim=2)


def _bias(model: Any, rows: int) -> Tensor | None:
    """The first rows [A, rows, L] of Beit's bias: from the last block's table, and from the one all blocks share."""
    owners: list[Any] = [getattr(model, "rel_pos_bias", None), model.blocks[-1].attn]
    found = [
        F.embedding(part.relative_position_index[:rows], part.relative_position_bias_table).permute(2, 0, 1)
        for part in owners
        if getattr(part, "relative_position_bias_table", None) is not None
    ]
    return sum(found[1:], found[0]) if found else None


def _weights(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax in float32 of queries [B, A, R, d] and keys [B, A, L, d]: [B, A, R, L]."""
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.float() * scale) @ key.float().transpose(-2, -1)
        return (scores if bias is None else scores + bias.float()).softmax(dim=-1)
