"""MAE's network: what the decoder reads and where, fixed positions; what the encoder sees is in test_keeping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PATCHES, SIZE, disturbed, every_family, family_arguments, parts
from safetensors.torch import load_file
from torch import Tensor, nn

from dtm_triton.partition import Partition
from dtm_triton.train.config import OptimizerConfig
from dtm_triton.train.engine.optimizer import parameter_groups
from dtm_triton.train.models.autoencoder import Decoder, MaskedAutoencoder
from dtm_triton.train.models.average import follow, frozen_copy
from dtm_triton.train.models.export import export_student, load_exported
from dtm_triton.train.models.student import MaskedStudent


def build(family: str = "vit", **changes: Any) -> Any:
    name, kwargs = family_arguments(family)
    kwargs = {**kwargs, **changes.pop("model_kwargs", {})}
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 2, "heads": 2, "out_features": 5, **SIZE, **changes}
    return MaskedAutoencoder(name, model_kwargs=kwargs, **settings)


def images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, 12, 8, generator=torch.Generator().manual_seed(2))


def places(*images: tuple[int, ...]) -> Tensor:
    return torch.tensor([[place in image for place in range(PATCHES)] for image in images])


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("thrown", [((), ()), ((0, 5, 8, 22), (2, 3, 9, 14))])
def test_the_decoder_reads_prefix_and_kept_patches_in_raster_order(prefix: int, thrown: Any) -> None:
    torch.manual_seed(0)
    decoder = Decoder(24, (6, 4), width=16, depth=1, heads=2, out_features=5)
    nn.init.normal_(decoder.mask_token)
    seen: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    visible = ((2, 7, 23), (0, 1, 10))
    kept = [[place for place in range(PATCHES) if place not in each] for each in thrown]
    masked = [tuple(place for place in all_ if place not in own) for all_, own in zip(kept, visible, strict=True)]
    partition = Partition.of(places(*masked), places(*thrown), len(masked[0]), len(thrown[0]))
    tokens = torch.rand(2, prefix + 3, 24)
    outputs = decoder(tokens, partition)
    embedded = decoder.embed(tokens)
    for image in range(2):
        expected = [embedded[image, number] for number in range(prefix)]  # no position
        for place in kept[image]:
            known = place in visible[image]
            token = embedded[image, prefix + visible[image].index(place)] if known else decoder.mask_token
            expected.append(token + decoder.positions[place])
        torch.testing.assert_close(seen[0][image], torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert outputs.shape == (2, len(kept[0]), 5) and decoder.positions.unique(dim=0).shape == (PATCHES, 16)
    last = decoder.head(decoder.norm(decoder.blocks(seen[0])))
    assert torch.equal(outputs, last[:, prefix:])


@every_family
def test_the_decoder_reads_what_the_encoder_says(family: str) -> None:
    network, partition = disturbed(build(family)).eval(), parts(3, masked=7, thrown=9)
    seen: list[Tensor] = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(images(), partition)
    prefix = network.backbone.num_prefix_tokens
    assert seen[0].shape == (3, prefix + 8, 24)
    assert torch.equal(seen[0][:, prefix:], network.tokens(images(), partition))
    outputs = []
    for change in (0.0, 1.0):
        hook = network.decoder.register_forward_pre_hook(lambda module, inputs, by=change: _add(inputs, by, prefix))
        outputs.append(network(images(), partition))
        hook.remove()
    assert torch.equal(*outputs) is (prefix == 0), "prefix tokens matter"


def _add(inputs: tuple[Tensor, Partition], by: float, prefix: int) -> tuple[Tensor, Partition]:
    tokens = inputs[0].clone()
    tokens[:, :prefix] += by * torch.linspace(-1, 1, 24)
    return tokens, inputs[1]


def test_names_without_decay_and_what_an_average_leaves_out() -> None:
    network = build("beit")
    assert not any("patch_embed.mask_token" in name for name, _ in network.named_parameters())
    assert "decoder.mask_token" in network.no_weight_decay()
    assert "backbone.patch_embed.proj.weight" not in network.no_weight_decay()
    average = frozen_copy(network)
    own = {name for name, _ in network.named_parameters() if not name.startswith("decoder.")}
    assert {name for name, _ in average.named_parameters()} == own
    assert average.tokens(images(), average=2).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 18}, "decoder.width must be a multiple of 4"), ({"heads": 3}, "decoder.heads 3, got 16")],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def sine_cosine(row: int, column: int, width: int) -> list[float]:
    """MAE's numbers for a patch, sorted: its order of channels is another one."""
    rates = [1 / 10000 ** (k / (width / 4)) for k in range(width // 4)]
    return sorted(wave(rate * at) for at in (row, column) for rate in rates for wave in (math.sin, math.cos))


FIXED = ["vit", "vit-no-class", "vit-registers", "vit-clip", "vit-dynamic", "beit-absolute", "eva"]


@pytest.mark.parametrize("family", FIXED)
@pytest.mark.parametrize("kind", ["autoencoder", "student"])
def test_fixed_positions(family: str, kind: str, tmp_path: Path) -> None:
    name, kwargs = family_arguments(family)
    settings = {"model_kwargs": kwargs, "out_features": 5, "positions": "sincos", **SIZE}
    torch.manual_seed(0)
    network: Any = MaskedStudent(name, **settings) if kind == "student" else build(family, positions="sincos")
    table = network.backbone.pos_embed
    before = table.clone()
    prefix = table.shape[1] - PATCHES
    assert not table[:, :prefix].any() and not table.requires_grad
    for place in range(PATCHES):
        expected = torch.tensor(sine_cosine(place // 4, place % 4, 24))
        torch.testing.assert_close(table[0, prefix + place].sort().values, expected, atol=1e-5, rtol=1e-4)
    assert table[0, prefix:].unique(dim=0).shape[0] == PATCHES
    # trained in no way
    groups = parameter_groups(network, OptimizerConfig(lr=1e-2, weight_decay=0.5, layer_decay=0.5))
    assert "backbone.pos_embed" not in [each for group in groups for each in group["names"]]
    assert network.layer_of("backbone.pos_embed") == 0 and "backbone.pos_embed" in network.no_weight_decay()
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    network(images(), parts(3, masked=7, thrown=9)).square().mean().backward()
    optimizer.step()
    average = frozen_copy(network)
    follow(average, network, 0.5)
    assert torch.equal(table, before) and torch.equal(average.backbone.pos_embed, before)
    # and kept as a table like any other
    weights = export_student(network, tmp_path)
    assert torch.equal(load_file(weights)["pos_embed"], before)
    exported: Any = load_exported(tmp_path)
    torch.testing.assert_close(exported(images())[:, -PATCHES:], network.eval().tokens(images()))
    again: Any = MaskedStudent(name, **{**settings, "positions": "learned"})
    again.load_backbone_state_dict(load_file(weights))
    assert torch.equal(again.backbone.pos_embed, before) and again.backbone.pos_embed.requires_grad


def test_fixed_positions_need_a_table_and_room() -> None:
    with pytest.raises(ValueError, match="positions must be 'learned' .* got 'sincos', 'beitv2_base_patch16_224'"):
        build("beit", positions="sincos")
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        build(positions="sincos", model_kwargs={"embed_dim": 18})
