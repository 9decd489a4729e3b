"""Targets from pixels against literal loops; teachers of every family, of any patch size, on any grid."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from shrunk import SMALL
from torch.nn import functional as F

from dtm_triton.train import recipes
from dtm_triton.train.build import build_targets
from dtm_triton.train.command_line import run_command
from dtm_triton.train.config import PretrainConfig, TeacherConfig
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.attention import attention_map
from dtm_triton.train.models.targets import HogTargets, PixelTargets
from dtm_triton.train.models.teacher import build_teacher

FAMILIES: dict[str, tuple[str, int, int, int]] = {  # model, patch, prefix tokens, width of the head
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", 16, 1, 512),
    "dinov2": ("vit_base_patch14_dinov2.lvd142m", 14, 1, 0),
    "dinov2-registers": ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 5, 0),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", 16, 5, 0),
    "siglip": ("vit_base_patch16_siglip_224.v2_webli", 16, 0, 0),
    "eva-clip": ("eva02_base_patch16_clip_224.merged2b", 16, 1, 512),
    "supervised": ("vit_small_patch32_224.augreg_in21k_ft_in1k", 32, 1, 1000),
}


@pytest.mark.parametrize("standardise", [True, False])
def test_pixel_targets_are_patches_standardised_or_not(standardise: bool) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    targets = PixelTargets((4, 6), 2, mean, std, standardise=standardise)(images)
    for image, tokens in zip(images, targets, strict=True):
        for row in range(2):
            for column in range(3):
                pixels = [
                    (float(image[c, 2 * row + y, 2 * column + x]) - mean[c]) / std[c]
                    for y in range(2)
                    for x in range(2)
                    for c in range(3)
                ]
                patch = torch.tensor(pixels)
                expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt() if standardise else patch
                torch.testing.assert_close(tokens[3 * row + column], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("patch", "size"), [(8, (16, 24)), (3, (6, 9))])
def test_hog_targets_are_histograms_of_gradients(patch: int, size: tuple[int, int]) -> None:
    images = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(0))
    hog = HogTargets(size, patch, 2)
    targets, (height, width), cell, cells = hog(images), hog.grid, hog.cell, hog.cells
    assert targets.shape == (2, height * width, hog.out_features) and cell * cells == patch
    for b, image in enumerate(images.tolist()):
        for patch_row in range(height):
            for patch_column in range(width):
                found = targets[b, patch_row * width + patch_column].view(2, cells, cells, 9)
                for c, plane in enumerate(image):
                    for y in range(cells):
                        for x in range(cells):
                            expected = [0.0] * 9
                            for row in range(patch_row * patch + y * cell, patch_row * patch + (y + 1) * cell):
                                for column in range(
                                    patch_column * patch + x * cell, patch_column * patch + (x + 1) * cell
                                ):
                                    inner_row, inner_column = 0 < row < size[0] - 1, 0 < column < size[1] - 1
                                    down = plane[row + 1][column] - plane[row - 1][column] if inner_row else 0.0
                                    right = plane[row][column + 1] - plane[row][column - 1] if inner_column else 0.0
                                    angle = math.degrees(math.atan2(down, right)) % 180
                                    expected[min(int(angle // 20), 8)] += math.hypot(down, right)
                            length = math.sqrt(sum(value**2 for value in expected))
                            unit = torch.tensor([value / max(length, 1e-5) for value in expected])
                            torch.testing.assert_close(found[c, y, x], unit, atol=1e-4, rtol=1e-4)


def test_flat_images_have_finite_targets() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    for targets in (PixelTargets((8, 8), 4, (0.5,) * 3, (0.5,) * 3), HogTargets((8, 8), 4, 3)):
        assert torch.equal(targets(flat), torch.zeros(1, 4, targets.out_features))


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_of_every_family(family: str, tmp_path: Path) -> None:
    name, patch, prefix, width = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    arguments: dict[str, Any] = dict(weights=tmp_path / "teacher.safetensors", model_kwargs=SMALL, project=width > 0)
    teacher = build_teacher(name, grid=(3, 5), in_chans=3, **arguments)
    assert teacher.grid == (3, 5) and teacher.image_size == (3 * patch, 5 * patch)
    assert teacher.out_features == (width or 24) and model.num_prefix_tokens == prefix
    x = torch.rand(2, 3, 48, 80)  # of a student with patches of 16
    targets = teacher(x)
    assert targets.shape == (2, 15, width or 24)
    model.set_input_size(img_size=(3 * patch, 5 * patch))
    config = model.pretrained_cfg
    if x.shape[-2:] != teacher.image_size:
        x = F.interpolate(x, teacher.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    tokens = model.fc_norm(model.forward_features(x)[:, prefix:])
    torch.testing.assert_close(targets, model.head(tokens) if width else tokens, atol=1e-5, rtol=1e-4)
    y = torch.rand(2, 3, 45, 83)  # of any size: resized and normalised as for the targets
    maps = teacher.attention(y)
    assert maps.shape == (2, 15) and maps.dtype == torch.float32
    resized = F.interpolate(y, teacher.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    resized = (resized - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    torch.testing.assert_close(maps, attention_map(model, resized), atol=1e-4, rtol=1e-3)
    if not width:  # the final norm was the last to act
        assert ((targets - model.norm.bias) / model.norm.weight).mean(-1).abs().max() < 1e-4


def tiny_teacher(tmp_path: Path, **teacher: Any) -> PretrainConfig:
    name = FAMILIES["clip"][0]
    path = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file(timm.create_model(name, **SMALL).state_dict(), path)
    base = recipes.dtm_vit_base_patch16_in1k()
    config = TeacherConfig(**{"kind": "timm", "model": name, "weights": path, "model_kwargs": dict(SMALL), **teacher})
    return replace(base, teacher=config)


def test_grey_images_are_repeated_for_a_teacher_of_colours(tmp_path: Path) -> None:
    base = tiny_teacher(tmp_path)
    grey = replace(base, data=replace(base.data, channels=1, mean=(0.5,), std=(0.5,)))
    teacher = build_targets(grey, Processes())
    x = torch.rand(2, 1, 224, 224)
    assert torch.equal(teacher(x), teacher(x.repeat(1, 3, 1, 1)))
    five = replace(base, data=replace(base.data, channels=5, mean=(0.5,) * 5, std=(0.5,) * 5))
    with pytest.raises(FolderError, match=r"teacher\.model must take images of 5 channels, .* takes 3"):
        build_targets(five, Processes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": Path("nowhere.safetensors")}, r"teacher\.weights 'nowhere\.safetensors' is neither"),
        ({"model_kwargs": {**SMALL, "depth": 3}}, r"teacher\.weights .* do not fit model"),
        ({"model": "vit_base_patch16_klip"}, r"teacher\.model must be the name of a timm model"),
        ({"model": "vit_base_patch14_dinov2.lvd142m", "project": True}, r"teacher\.(weights|project) "),
    ],
)
def test_what_cannot_be_a_teacher_ends_a_command_with_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = tiny_teacher(tmp_path, **changes)
    with pytest.raises(FolderError, match=message):
        build_targets(config, Processes())
    with pytest.raises(SystemExit) as stop:
        run_command("dtm-pretrain", lambda processes: build_targets(config, processes), "cpu")
    assert str(stop.value.code).startswith("dtm-pretrain: teacher.") and "\n" not in str(stop.value.code)


def test_an_empty_file_is_no_teacher_and_a_wrong_argument_is_named(tmp_path: Path) -> None:
    config = tiny_teacher(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    with pytest.raises(FolderError, match=r"teacher\.weights .* cannot be read as tensors only"):
        build_targets(config, Processes())
    bogus = replace(config, teacher=replace(config.teacher, model_kwargs={"bogus": 1}, weights=tmp_path / "x.pth"))
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(FolderError, match=r"teacher\.model_kwargs must be arguments of .*'bogus'"):
        build_targets(bogus, Processes())
