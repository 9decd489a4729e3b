"""Mixup, CutMix and random erasing: what they do to pixels and labels, how they are distributed, who decides them."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shrunk import SIZE, shrink_finetuning, write_images
from timm.data.mixup import Mixup, mixup_target
from torch import Generator, Tensor
from torch.nn import functional as F

from dtm_triton.train import recipes
from dtm_triton.train.build import build_network
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.data.draws import draw_images
from dtm_triton.train.data.erasing import Erasing, normal
from dtm_triton.train.data.images import open_images
from dtm_triton.train.data.mixing import Mixing, neighbours
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.models.classifier import Classifier
from dtm_triton.train.models.teacher import ConvTeacher
from dtm_triton.train.objectives.supervised import Supervised

MANY = 20_000


def drawn(what: Mixing | Erasing, count: int, seed: int = 0) -> Tensor:
    return what.draw(count, generator=Generator().manual_seed(seed))


def area(numbers: Tensor) -> Tensor:
    return (numbers[:, 2] - numbers[:, 1]) * (numbers[:, 4] - numbers[:, 3])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_pixels_and_targets_are_timms(mixup: float, cutmix: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images are each other's neighbour in both; timm is told the shares and rectangles that we drew."""
    mixing = Mixing(mixup, cutmix, SIZE)
    images, labels = torch.rand(2, 3, *SIZE, generator=Generator().manual_seed(1)), torch.tensor([4, 1])
    for seed in range(30):
        numbers = drawn(mixing, 2, seed)
        cut = numbers[:, 0] == 0
        theirs = Mixup(mixup, cutmix, mode="elem", label_smoothing=0.1, num_classes=6)
        boxes = iter([tuple(int(side) for side in row[1:]) for row, is_cut in zip(numbers, cut, strict=True) if is_cut])
        asked = np.where(cut, 0.5, numbers[:, 0]).astype(np.float32), cut.numpy()
        monkeypatch.setattr(theirs, "_params_per_elem", lambda count, asked=asked: asked)
        monkeypatch.setattr("timm.data.mixup.rand_bbox", lambda *_, boxes=boxes, **__: next(boxes))
        expected, targets = theirs(images.clone(), labels)
        found, shares = mixing(images, numbers)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(targets, mixup_target(labels, 6, shares[:, None], smoothing=0.1))


def test_shares_are_beta_and_rectangles_are_where_timm_draws_them() -> None:
    blend, cut = drawn(Mixing(0.8, 0.0, SIZE), MANY), drawn(Mixing(0.0, 1.0, SIZE), MANY)
    assert blend[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert blend[:, 0].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.03)  # Beta(a, a)
    assert bool((area(blend) == SIZE[0] * SIZE[1]).all()) and not cut[:, 0].any()
    both = drawn(Mixing(0.8, 1.0, SIZE), MANY)
    assert (both[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.015)
    rng = np.random.default_rng(0)
    theirs = []
    for _ in range(4000):
        ratio = math.sqrt(1 - rng.beta(1, 1))
        high, wide = int(SIZE[0] * ratio), int(SIZE[1] * ratio)
        y, x = rng.integers(SIZE[0]), rng.integers(SIZE[1])
        rows = min(max(y + (high + 1) // 2, 0), SIZE[0]) - max(y - high // 2, 0)
        theirs.append(rows * (min(max(x + (wide + 1) // 2, 0), SIZE[1]) - max(x - wide // 2, 0)))
    assert area(cut).mean() == pytest.approx(np.mean(theirs), rel=0.05)
    assert area(cut).std() == pytest.approx(np.std(theirs), rel=0.05)
    high, wide = cut[:, 2] - cut[:, 1], cut[:, 4] - cut[:, 3]
    whole = (cut[:, 1] > 0) & (cut[:, 2] < SIZE[0]) & (cut[:, 3] > 0) & (cut[:, 4] < SIZE[1])
    for side, other, length, across in ((high, wide, *SIZE), (wide, high, *SIZE[::-1])):
        assert bool((side[whole] < (other[whole] + 1) / across * length).all()), "both are cut off from one ratio"
        assert (side[whole] % 2).mean() == pytest.approx(0.5, abs=0.1), "odd sides as often as even ones"
    assert cut[:, 1:].min() == 0 and cut[:, 2].max() == SIZE[0] and cut[:, 4].max() == SIZE[1]


def test_an_image_left_over_is_refused() -> None:
    mixing = Mixing(0.8, 1.0, SIZE)
    with pytest.raises(ValueError, match="run.batch_size must give every process pairs of images to mix, got 3"):
        mixing(torch.rand(3, 1, *SIZE), drawn(mixing, 3))


def test_the_loss_is_cross_entropy_with_both_labels_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = recipes.digits()
    network = ConvTeacher(config.image_size, 2, in_chans=1, out_features=8).eval()
    objective = Supervised(network, config, label_smoothing=0.1, mixup=0.8, cutmix=1.0)
    images = torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8)
    batch = {"images": images, "labels": torch.arange(8), "mix": drawn(objective.draws()["mix"].__self__, 8)}  # type: ignore[attr-defined]
    found = objective(batch)
    mixed, shares = objective.mixing(augment(batch), batch["mix"])  # type: ignore[misc]
    one_hot = F.one_hot(batch["labels"], 10) * 0.9 + 0.01
    targets = shares[:, None] * one_hot + (1 - shares[:, None]) * neighbours(one_hot)
    torch.testing.assert_close(found["loss"], F.cross_entropy(network(mixed), targets))
    batch["labels"] = torch.arange(8) % 2  # neighbours differ
    larger = torch.where(shares < 0.5, 1 - batch["labels"], batch["labels"])
    monkeypatch.setattr(network, "forward", lambda images: F.one_hot(larger, 10).float())
    assert objective(batch)["train_accuracy"] == 1, "the label of the larger share is the right one"
    monkeypatch.undo()
    plain = Supervised(network, config, label_smoothing=0.1)
    assert plain.draws() == {}
    expected = F.cross_entropy(network(augment(batch)), batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(plain(batch)["loss"], expected)


def test_images_are_erased_after_they_are_normalised() -> None:
    torch.manual_seed(0)
    config = recipes.digits()
    student = replace(recipes.digits_student(), model_kwargs={"embed_dim": 24, "depth": 1, "num_heads": 3})
    network = build_network(Classifier, student, config, out_features=10)
    objective = Supervised(network, config, random_erasing=0.5)
    batch = {"images": torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8), "labels": torch.arange(8)}
    batch["erase"] = drawn(Erasing(0.5, config.image_size), 8)
    assert 0 < (area(batch["erase"]) > 0).sum() < 8
    images = Erasing(0.5, config.image_size)(Normalise(config.mean, config.std)(augment(batch)), batch["erase"])
    torch.testing.assert_close(objective(batch)["loss"], F.cross_entropy(network(images), batch["labels"]))
    assert torch.equal(objective.draws()["erase"](8, generator=Generator().manual_seed(0)), batch["erase"])


def test_noise_is_normal_and_a_function_of_seed_and_place() -> None:
    noise = normal(torch.tensor([0, 1, 2**62 + 5, -7]), 200_000).double()
    assert noise.isfinite().all() and noise.abs().max() < 5.5
    for row in noise:
        assert abs(row.mean()) < 0.01 and abs(row.var() - 1) < 0.02
        assert abs((row**4).mean() - 3) < 0.1 and abs((row[1:] * row[:-1]).mean()) < 0.01
        shares = torch.histc(row.clamp(-3, 3), 6, -3, 3) / len(row)
        cdf = torch.special.ndtr(torch.tensor([-math.inf, -2, -1, 0, 1, 2, math.inf], dtype=torch.float64))
        assert (shares - cdf.diff()).abs().max() < 0.005
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.01
    again = normal(torch.tensor([2**62 + 5]), 1000)
    assert torch.equal(again[0], noise[2, :1000].float())


def test_rectangles_are_erased_as_often_and_as_large_as_asked() -> None:
    erasing = Erasing(0.25, (60, 80))
    numbers = drawn(erasing, MANY)
    erased = area(numbers) > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=0.01)
    shares = area(numbers)[erased] / (60 * 80)
    assert 0.018 < shares.min() < 0.022 and 0.3 < shares.max() < 0.35
    # a few of the largest do not fit
    assert shares.double().mean() == pytest.approx((0.02 + 1 / 3) / 2, rel=0.05)
    chosen = numbers[erased]
    aspect = (chosen[:, 2] - chosen[:, 1]) / (chosen[:, 4] - chosen[:, 3])
    assert 0.25 < aspect.min() < 0.35 and 2.8 < aspect.max() < 4
    assert chosen[:, 1].min() == 0 and chosen[:, 2].max() == 60 and chosen[:, 4].max() == 80
    assert drawn(erasing, 500)[:, 0].unique().numel() == 500
    assert not area(drawn(Erasing(0.0, (60, 80)), 500)).any()


def test_what_lies_outside_a_rectangle_stays() -> None:
    erasing = Erasing(1.0, SIZE)
    images = torch.rand(64, 3, *SIZE, generator=Generator().manual_seed(1))
    numbers = drawn(erasing, 64)
    found = erasing(images, numbers)
    for image, before, (seed, top, bottom, left, right) in zip(found, images, numbers.tolist(), strict=True):
        noise = normal(torch.tensor([seed]), 3 * SIZE[0] * SIZE[1]).view(3, *SIZE)
        inside = image[:, top:bottom, left:right]
        assert torch.equal(inside, noise[:, top:bottom, left:right]) and inside.numel()
        image = image.clone()
        image[:, top:bottom, left:right] = before[:, top:bottom, left:right]
        assert torch.equal(image, before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("images")
    return shrink_finetuning(recipes.FINETUNE["finetune_mae_vit_base"](), write_images(folder), folder / "run")


def test_an_image_looks_the_same_in_any_division(config: Any) -> None:
    """Of a step over processes and micro-batches, down to pairs; and in the same step only."""
    images = open_images(config.data, "train")
    assert images is not None
    mixing, erasing = Mixing(0.8, 1.0, SIZE), Erasing(0.5, SIZE)
    normalise = Normalise(config.data.mean, config.data.std)

    def shown(step: int, count: int, accumulate: int) -> Tensor:
        run, parts = replace(config.run, accumulate=accumulate), []
        for micro in range(accumulate):
            for rank in range(count):
                draws = {"mix": mixing.draw, "erase": erasing.draw}
                batches = MicroBatches(images, config.data, run, Processes(rank=rank, count=count), draws)
                batch = batches[step * accumulate + micro]
                parts.append(mixing(erasing(normalise(augment(batch)), batch["erase"]), batch["mix"])[0])
        return torch.cat(parts)

    whole = shown(1, 1, 1)
    for count, accumulate in ((2, 1), (1, 2), (2, 2), (4, 1)):
        assert torch.equal(shown(1, count, accumulate), whole)
    assert not torch.equal(shown(0, 1, 1), whole)
    assert not torch.equal(draw_images(mixing.draw, 0, "mix", 0, 0, 64), draw_images(mixing.draw, 0, "mix", 1, 0, 64))


def test_workers_can_be_sent_them() -> None:
    for what in (Mixing(0.8, 1.0, SIZE), Erasing(0.5, SIZE)):
        copy = pickle.loads(pickle.dumps(what.draw))
        assert torch.equal(copy(5, generator=Generator().manual_seed(3)), drawn(what, 5, seed=3))
