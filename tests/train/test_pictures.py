"""Pictures of runs show what was trained on: the same crops, masks and maps; reconstructions undo what targets did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")

from tiny import tiny_config

from dtm_triton.attention_masking import crop_weights
from dtm_triton.partition import Partition
from dtm_triton.train import pictures
from dtm_triton.train.build import assemble
from dtm_triton.train.config import (
    AttentionConfig,
    DataConfig,
    DecoderConfig,
    LossConfig,
    MaskConfig,
    PretrainConfig,
    TeacherConfig,
)
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.keeping import take
from dtm_triton.train.models.targets import PixelTargets
from dtm_triton.train.objectives.tokens import TokenObjective

PATCHES = 12  # 3 x 4


def mae(folder: Path, *, standardise: bool = True, channels: int = 3, **mask: Any) -> PretrainConfig:
    mean, std = tuple(0.3 + 0.1 * c for c in range(channels)), tuple(0.2 + 0.1 * c for c in range(channels))
    base = tiny_config(folder, data={"channels": channels, "image_size": (6, 8), "mean": mean, "std": std})
    return replace(
        base,
        method="mae",
        teacher=TeacherConfig(kind="pixels", standardise=standardise),
        decoder=DecoderConfig(width=24, depth=1, heads=2),
        mask=MaskConfig(**{"kind": "attention", "masked": 5, "thrown": 4, **mask}),
        attention=AttentionConfig(warmup_epochs=1, warmup_masked=9),
        loss=LossConfig(morph=False, on="masked", kind="l2"),
    )


def build(config: PretrainConfig) -> TokenObjective:
    data: DataConfig = config.data
    targets = PixelTargets(data.image_size, 2, data.mean, data.std, standardise=config.teacher.standardise)
    return assemble(config, targets).train()


def batch(count: int = 3, channels: int = 3, maps: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(4)
    shown = {
        "images": torch.randint(256, (count, channels, 6, 8), generator=draw, dtype=torch.uint8),
        "flip": torch.tensor([True, False, True, False, True, False, True, False][:count]),
        "mask": torch.arange(count),
        "number": torch.arange(count),
        "place": torch.tensor([[0.1, 0.2, 0.7, 0.9]], dtype=torch.float64).expand(count, 4),
    }
    return shown | ({"map": torch.randint(256, (count, 3, 4), generator=draw, dtype=torch.uint8)} if maps else {})


class Oracle(nn.Module):
    """Predicts what its targets are, times `scale`; reports in what mode it was called."""

    grid = (3, 4)

    def __init__(self, targets: PixelTargets, config: PretrainConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.targets, self.scale, self.modes = targets, scale, []  # type: ignore[var-annotated]
        self.normalise = Normalise(config.data.mean, config.data.std)

    def forward(self, images: Tensor, partition: Partition) -> Tensor:
        self.modes.append(self.training)
        original = images * self.normalise.std + self.normalise.mean
        return self.scale * take(self.targets(original), partition.kept)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What was drawn, by the picture's file name: the images, then the rest."""
    seen: dict[str, tuple[Any, ...]] = {}
    for name in ("draw_masks", "draw_maps", "draw_reconstructions", "draw_groups", "draw_curves"):

        def note(*arguments: Any) -> None:
            path = next(item for item in arguments if isinstance(item, Path))
            seen[path.name] = arguments

        monkeypatch.setattr(pictures, name, note)
    return seen


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_prediction_gives_the_image_back(tmp_path: Path, standardise: bool, channels: int) -> None:
    config = mae(tmp_path, standardise=standardise, channels=channels)
    objective = build(config)
    oracle = Oracle(objective.teacher, config)
    objective.network = oracle
    pixels = torch.rand(3, channels, 6, 8)
    partition = objective.masks({"mask": torch.arange(3), **{k: batch(channels=channels)[k] for k in ("map", "place")}})
    again = pictures.reconstruct(config, objective, pixels, partition)
    assert torch.allclose(again, pixels, atol=1e-4)
    assert oracle.modes == [False] and oracle.training, "evaluated, and put back to training"


def test_a_standardised_prediction_of_nothing_is_the_patches_mean(tmp_path: Path) -> None:
    """And is put where the masked patches are, nowhere else."""
    config = mae(tmp_path)
    objective = build(config)
    objective.network = Oracle(objective.teacher, config, scale=0.0)
    pixels = torch.rand(2, 3, 6, 8)
    masked = torch.zeros(2, PATCHES, dtype=torch.bool)
    masked[0, 1] = masked[1, 6] = True
    thrown = torch.zeros_like(masked)
    thrown[:, 0] = True
    again = pictures.reconstruct(config, objective, pixels, Partition.of(masked, thrown, 1, 1))
    wanted = pixels.clone()
    normalise = Normalise(config.data.mean, config.data.std)
    for image, (y, x) in enumerate(((0, 2), (2, 4))):  # patches 1 and 6 of 3 x 4, two pixels a side
        patch = (slice(None), slice(y, y + 2), slice(x, x + 2))
        mean = normalise(pixels)[image][patch].mean()  # over pixels and channels
        wanted[image][patch] = (mean * normalise.std + normalise.mean)[0].expand(3, 2, 2)
    assert torch.allclose(again, wanted, atol=1e-5)


def test_a_runs_pictures(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path)
    objective, shown = build(config), batch(8)
    pictures.draw_run(config, objective, shown, Processes())
    assert sorted(drawn) == ["curves.png", "groups.png", "maps.png", "masks.png", "reconstructions.png"]
    pixels = augment(shown)[:6]
    for name in ("groups.png", "maps.png", "masks.png", "reconstructions.png"):
        assert torch.equal(drawn[name][0], pixels), f"{name}: the crops as they are trained on, flips and all"
    first = {name: value[:6] for name, value in shown.items()}
    partition = objective.partition(first, pixels)
    _, masks, grid, _, thrown = drawn["masks.png"]
    assert grid == (3, 4) and torch.equal(masks, partition.mask)
    assert torch.equal(thrown.nonzero()[:, 1].view(6, 4), partition.thrown)
    _, weights, _, _, below, away = drawn["maps.png"]
    wanted = crop_weights(first["map"], first["place"], (3, 4), flip=first["flip"])
    assert torch.allclose(weights.double(), wanted, rtol=1e-6) and torch.equal(below, masks)
    assert torch.equal(away, thrown)
    assert not drawn["reconstructions.png"][1].requires_grad, "of a network with parameters"
    assert torch.equal(drawn["reconstructions.png"][2], masks) and torch.equal(drawn["reconstructions.png"][5], thrown)


def test_pictures_without_maps_thrown_patches_or_pixels(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path, kind="random", thrown=0)
    config = replace(config, teacher=TeacherConfig(kind="hog"))
    shown = batch(2) | {"mask": torch.rand(2, PATCHES)}
    shown.pop("map")
    objective = build(replace(config, teacher=TeacherConfig(kind="pixels")))
    pictures.draw_run(config, objective, shown, Processes())
    assert sorted(drawn) == ["curves.png", "groups.png", "masks.png"]
    assert not drawn["masks.png"][4].any()


def test_live_maps_are_drawn_after_the_warm_up(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path)
    attention = replace(config.attention, maps="live")
    config = replace(config, attention=attention)
    objective = build(config)
    for epoch, there in ((0, False), (1, True)):
        drawn.clear()
        objective.epoch = epoch
        pictures.draw_run(config, objective, batch(maps=False), Processes())
        assert ("maps.png" in drawn) == there
    assert torch.allclose(drawn["maps.png"][1], objective.attend(augment(batch(maps=False))))


def test_a_stage_is_drawn_with_its_maps_and_masks(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path)
    objective, shown = build(config), batch()
    pictures.draw_stage(config, objective, shown, tmp_path / "masks_step_000000007.png", Processes())
    images, weights, grid, _, masks, thrown = drawn["masks_step_000000007.png"]
    assert torch.equal(images, augment(shown)) and grid == (3, 4)
    wanted = crop_weights(shown["map"], shown["place"], grid, flip=shown["flip"])
    assert torch.allclose(weights.double(), wanted, rtol=1e-6)
    assert torch.equal(masks, objective.partition(shown, images).mask) and thrown.sum() == 12


def test_only_the_first_process_draws(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path)
    second = Processes(rank=1)
    pictures.draw_run(config, build(config), batch(), second)
    pictures.draw_stage(config, build(config), batch(), tmp_path / "stage.png", second)
    assert not drawn


def test_images_of_other_channels_are_drawn_grey(tmp_path: Path) -> None:
    config = mae(tmp_path, channels=5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    pictures.draw_run(config, build(config), batch(channels=5), Processes())
    for name in ("curves", "groups", "maps", "masks", "reconstructions"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_maps_that_no_picture_can_hold_do_not_end_a_run(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    config = mae(tmp_path)
    shown = batch()
    shown["map"] = torch.full((3, 3, 4), torch.nan, dtype=torch.float16)
    pictures.draw_stage(config, build(config), shown, tmp_path / "stage.png", Processes())
    assert not drawn["stage.png"][1].any()
