"""Small timm models of every family that networks are built of, and partitions of their 6 x 4 patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtm_triton.partition import Partition

PATCHES = 24
SIZE: dict[str, Any] = {"image_size": (12, 8), "patch_size": 2}
SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3}
SHARED_BIAS = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-no-class": ("vit_tiny_patch16_224", {"class_token": False}),
    "vit-registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True}),
    "vit-dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "vit-clip": ("vit_base_patch16_clip_quickgelu_224.openai", {}),
    "beit": ("beitv2_base_patch16_224", {"init_values": 0.1}),
    "beit-shared": ("beit_base_patch16_224", SHARED_BIAS),
    "beit-both": ("beit_base_patch16_224", {**SHARED_BIAS, "use_rel_pos_bias": True}),
    "beit-absolute": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "eva-apart": ("eva02_tiny_patch14_224", {"qkv_fused": False, "init_values": 0.1}),
    "eva-dynamic": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
    "eva-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {"init_values": 0.1}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_arguments(family: str) -> tuple[str, dict[str, Any]]:
    """The model's name, and its `model_kwargs`."""
    name, kwargs = FAMILIES[family]
    return name, {**SMALL, **kwargs}


def disturbed(network: Any, by: float = 0.3) -> Any:
    """Every weight a little off, so that nothing is zero, constant or negligible."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return network


def parts(batch: int, masked: int, thrown: int, seed: int = 1) -> Partition:
    """Other patches in every image."""
    rank = torch.rand(batch, PATCHES, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return Partition.of(rank < masked, (rank >= masked) & (rank < masked + thrown), masked, thrown)


class Looks(nn.Module):
    """In the place of Beit's shared bias: what it gives, and minus infinity for patches that nobody looks at."""

    def __init__(self, shared: Any, allowed: Tensor) -> None:
        super().__init__()
        self.shared, self.allowed = shared, allowed

    def forward(self) -> Tensor:
        hidden = torch.zeros(self.allowed.shape).masked_fill(~self.allowed, float("-inf"))
        return hidden if self.shared is None else self.shared() + hidden


def looked_at(plain: Any, images: Any, seen: Tensor) -> Tensor:
    """Normed patch tokens [B, N, D] of an unmodified model of which no token attends to patches that are not `seen`."""
    prefix = plain.num_prefix_tokens
    columns = torch.cat([torch.ones(len(seen), prefix, dtype=torch.bool), seen], dim=1)
    allowed = columns[:, None, None, :].expand(-1, -1, prefix + PATCHES, -1)
    if hasattr(plain, "rel_pos_bias"):
        with _replaced(plain, "rel_pos_bias", Looks(plain.rel_pos_bias, allowed)):
            return plain.forward_features(images)[:, prefix:]
    return plain.forward_features(images, attn_mask=allowed)[:, prefix:]


@contextmanager
def _replaced(module: nn.Module, name: str, value: nn.Module) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
