"""Frozen-feature evaluation against scikit-learn and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
from sklearn.neighbors import KNeighborsClassifier

from dtm_triton.train import evaluate
from dtm_triton.train.evaluate import extract_features, knn_accuracy, linear_probe_accuracy


def blobs(seed: int, rows: int, spread: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 4, (rows,), generator=generator)
    return centres[labels] + spread * torch.randn(rows, 6, generator=generator), labels * 3 + 1


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_knn_equals_scikit_learn(k, temperature, seed, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 17)  # tests cross the edges of chunks
    train_x, train_y = blobs(seed, 150, spread=1.5)
    test_x, test_y = blobs(seed + 100, 60, spread=1.5)
    theirs = KNeighborsClassifier(
        min(k, 150), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train_x.double(), train_y)
    expected = theirs.score(test_x.double(), test_y)
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=k, temperature=temperature) == pytest.approx(expected)
    assert 0.2 < expected < 1.0, "the case decides nothing"


def test_knn_weighs_votes_by_similarity():
    # two far neighbours of class 0 against one near of class 1: majority says 0, weights say 1
    train_x = torch.tensor([[0.0, 1.0], [0.05, 1.0], [1.0, 0.1]])
    train_y = torch.tensor([0, 0, 1])
    query, truth = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert knn_accuracy(train_x, train_y, query, truth, k=3) == 1.0
    assert knn_accuracy(train_x, train_y, query, truth, k=3, temperature=1e6) == 0.0


def test_knn_is_the_same_under_autocast():
    (train_x, train_y), (test_x, test_y) = blobs(0, 150, spread=1.5), blobs(100, 60, spread=1.5)
    expected = knn_accuracy(train_x, train_y, test_x, test_y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(train_x, train_y, test_x, test_y) == expected


def test_knn_zero_rows_extreme_temperature_and_unseen_labels():
    x, y = torch.eye(3), torch.tensor([7, 8, 9])
    assert knn_accuracy(x, y, x, y, k=3, temperature=1e-6) == 1.0
    # both votes would overflow, and the lower label win the tie
    near = torch.tensor([[1.0, 0.5], [1.0, 0.0]]), torch.tensor([0, 1])
    assert knn_accuracy(*near, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), k=2, temperature=1e-3) == 1.0
    assert knn_accuracy(x, y, torch.zeros(1, 3), torch.tensor([7]), k=3) == 1.0
    assert knn_accuracy(x, y, x, torch.tensor([0, 8, 0]), k=1) == pytest.approx(1 / 3)


def test_linear_probe_learns_what_is_linear():
    train, test = blobs(0, 400), blobs(1, 200)
    accuracy = linear_probe_accuracy(*train, *test)
    assert accuracy > 0.85
    shuffled = train[1][torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert linear_probe_accuracy(train[0], shuffled, *test) < accuracy - 0.25
    assert linear_probe_accuracy(*train, *test) == accuracy, "not deterministic"


def test_linear_probe_standardises_with_the_training_rows():
    (train_x, train_y), (test_x, test_y) = blobs(0, 400), blobs(1, 200)
    accuracy = linear_probe_accuracy(train_x, train_y, test_x, test_y)
    scale, shift = torch.tensor([1e-4, 1.0, 1e3, 1.0, 1.0, 10.0]), 5.0
    moved = linear_probe_accuracy(train_x * scale + shift * scale, train_y, test_x * scale + shift * scale, test_y)
    assert moved == pytest.approx(accuracy, abs=0.01)
    # a faint signal beside a loud noise: without standardisation the penalty silences the signal
    noise = torch.randn(600, 1, generator=torch.Generator().manual_seed(2)) * 1e3
    faint = torch.cat([train_x * 1e-3, noise[:400]], 1), torch.cat([test_x * 1e-3, noise[400:]], 1)
    assert linear_probe_accuracy(faint[0], train_y, faint[1], test_y) > 0.8
    half = test_x[test_y < 5], test_y[test_y < 5]
    ours = linear_probe_accuracy(train_x, train_y, *half)
    rest = linear_probe_accuracy(train_x, train_y, test_x[test_y >= 5], test_y[test_y >= 5])
    assert ours * len(half[1]) + rest * (200 - len(half[1])) == pytest.approx(accuracy * 200)
    constant = torch.cat([train_x, torch.ones(400, 1)], 1), torch.cat([test_x, torch.ones(200, 1)], 1)
    assert linear_probe_accuracy(constant[0], train_y, constant[1], test_y) == pytest.approx(accuracy)


@pytest.mark.parametrize("evaluator", [knn_accuracy, linear_probe_accuracy])
def test_bad_input(evaluator):
    x, y = blobs(0, 10)
    with pytest.raises(ValueError, match=r"train_x must be \[M, D\] .* got \[10, 6\] and \[9\]"):
        evaluator(x, y[:9], x, y)
    with pytest.raises(ValueError, match=r"test_x must be \[M, D\] .* got \[0, 6\]"):
        evaluator(x, y, x[:0], y[:0])
    with pytest.raises(ValueError, match="test_x must have train_x's 6 columns, got 5"):
        evaluator(x, y, x[:, :5], y)
    with pytest.raises(ValueError, match="train_x must be finite, got 1"):
        evaluator(torch.cat([x[:9], torch.tensor([[torch.nan, 0, 0, 0, 0, 0]])]), y, x, y)


def test_bad_settings():
    x, y = blobs(0, 10)
    with pytest.raises(ValueError, match=r"k .* 0"):
        knn_accuracy(x, y, x, y, k=0)
    with pytest.raises(ValueError, match=r"temperature .* 0"):
        knn_accuracy(x, y, x, y, temperature=0)
    with pytest.raises(ValueError, match=r"train_y .* two classes, got \[1\]"):
        linear_probe_accuracy(x, torch.ones_like(y), x, y)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.drop(images.flatten(1) * self.weight)

    def features(self, images):
        assert not self.training
        return self(images) * 2

    def broken(self, images):
        raise RuntimeError("broken")


def test_extract_features_evaluates_without_gradients_and_restores_modes():
    model = Backbone().train()
    model.frozen.eval()
    batches = [(torch.full((2, 1, 1, 3), float(i)), torch.tensor([i, i])) for i in range(3)]
    for fn, factor in ((model, 1), (model.features, 2)):
        features, labels = extract_features(fn, batches)
        assert features.dtype == torch.float32 and not features.requires_grad
        assert features.tolist() == [[factor * i] * 3 for i in (0.0, 0.0, 1.0, 1.0, 2.0, 2.0)]
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert model.training and model.drop.training and not model.frozen.training
    with pytest.raises(RuntimeError, match="broken"):
        extract_features(model.broken, batches)
    assert model.training and not model.frozen.training
    some, kept = extract_features(lambda images: images.flatten(1), [(torch.eye(3), torch.tensor([4, -1, 0]))])
    assert kept.tolist() == [4, 0] and torch.equal(some, torch.eye(3)[[0, 2]])
    assert extract_features(lambda images: images.half().flatten(1), batches)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="loader must yield"):
        extract_features(model, [])
