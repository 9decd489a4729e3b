"""MAE's network over timm's families: dropped is as if not attended to, predictions lie in their places."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from dtm_triton.train.models.autoencoder import Decoder, MaskedAutoencoder
from dtm_triton.train.models.average import frozen_copy

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True}),
    "vit-no-class": ("vit_tiny_patch16_224", {"class_token": False}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {"init_values": 0.1}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str = "vit", masked: int = 15, **changes: Any) -> Any:
    name, kwargs = FAMILIES[family]
    torch.manual_seed(0)
    settings = {"out_features": 5, "image_size": (12, 8), "patch_size": 2, "in_chans": 5, **changes}
    settings = {"width": 16, "depth": 1, "heads": 2, **settings}
    return MaskedAutoencoder(
        name, masked=masked, model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3, **kwargs}, **settings
    )


def images_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(3, 24, generator=generator)
    return torch.rand(3, 5, 12, 8, generator=generator), scores.argsort(1).argsort(1) < 15


@every_family
def test_dropped_patches_are_as_if_nobody_attended_to_them(family: str) -> None:
    network = build(family).eval()
    images, mask = images_and_mask()
    visible = network.tokens(images, mask)
    plain: Any = timm.create_model(network.model_name, **network.create_kwargs).eval()
    plain.load_state_dict(network.backbone_state_dict(), strict=True)
    prefix = plain.num_prefix_tokens
    seen = torch.cat([torch.ones(3, prefix, dtype=torch.bool), ~mask], dim=1)
    attention = seen[:, None, None, :].expand(-1, -1, prefix + 24, -1)
    whole = plain.forward_intermediates(
        images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True, attn_mask=attention
    )[0]
    torch.testing.assert_close(visible, whole[~mask].view(3, 9, 24), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.tokens(images), plain.forward_features(images)[:, prefix:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network.features(images), network.tokens(images).mean(1))


@every_family
def test_every_parameter_takes_part(family: str) -> None:
    network = build(family)
    images, mask = images_and_mask()
    network(images, mask).square().mean().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == [] and not any("patch_embed.mask_token" in name for name, _ in network.named_parameters())
    assert "decoder.mask_token" in network.no_weight_decay() and "backbone.patch_embed.proj.weight" not in (
        network.no_weight_decay()
    )
    average = frozen_copy(network)
    assert {name for name, _ in average.named_parameters()} == {
        name for name, _ in network.named_parameters() if not name.startswith("decoder.")
    }
    assert average.tokens(images, average=2).shape == (3, 24, 24)


def test_the_decoder_reads_tokens_in_raster_order_at_their_positions() -> None:
    torch.manual_seed(0)
    decoder = Decoder(24, (6, 4), width=16, depth=1, heads=2, out_features=5)
    seen: list[torch.Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    visible, places = torch.rand(1, 3, 24), torch.tensor([[2, 7, 23]])
    assert decoder(visible, places).shape == (1, 24, 5)
    content = seen[0][0] - decoder.positions
    embedded = decoder.embed(visible)[0]
    for place in range(24):
        expected = embedded[[2, 7, 23].index(place)] if place in (2, 7, 23) else decoder.mask_token
        torch.testing.assert_close(content[place], expected, atol=1e-6, rtol=1e-5)
    assert decoder.positions.unique(dim=0).shape == (24, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": 24}, "masked must leave patches to see, got 24 of 24"),
        ({"width": 18}, "decoder.width must be a multiple of 4"),
        ({"width": 16, "heads": 3}, "decoder.heads 3, got 16"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_beit_cannot_drop_patches() -> None:
    with pytest.raises(ValueError, match=r"drop patches .* 'beit_base_patch16_224'"):
        MaskedAutoencoder(
            "beit_base_patch16_224", masked=1, width=16, depth=1, heads=2, out_features=5, image_size=4, patch_size=2,
            model_kwargs={"embed_dim": 24, "depth": 1, "num_heads": 3},
        )  # fmt: skip
