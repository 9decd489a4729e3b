"""How good frozen features are: nearest neighbours and a linear probe. Accuracies are fractions, 0..1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 1024  # test rows whose similarities to all training rows are held at once


def extract_features(
    fn: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of everything a loader yields, computed in eval mode and without gradients.

    Args:
        fn: a module, a method of one (`student.features`), or any function of images [B, C, H, W] to features [B, D].
            The module's train / eval modes are put back as they were, also after an error.
        loader: yields (images, labels [B]). Rows with the label -1 (images that fill a batch, or could not be read) are
            computed and left out.
        device: images are moved there first; None leaves them.

    Returns:
        (features float32 [M, D], labels [M]), both on the CPU.

    Raises:
        ValueError: the loader yields nothing.

    >>> batches = [(torch.ones(2, 1, 4, 4), torch.tensor([0, 1])), (torch.zeros(1, 1, 4, 4), torch.tensor([2]))]
    >>> features, labels = extract_features(lambda images: images.mean((2, 3)), batches)
    >>> features.flatten().tolist(), labels.tolist()
    ([1.0, 1.0, 0.0], [0, 1, 2])
    """
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluating(owner) if isinstance(owner, nn.Module) else nullcontext(), torch.no_grad():
        for images, target in loader:
            target = target.cpu()
            rows = fn(images if device is None else images.to(device)).float().cpu()
            features.append(rows[target >= 0])
            labels.append(target[target >= 0])
    if not features:
        raise ValueError(f"loader must yield at least one batch, got none from {loader!r}")
    return torch.cat(features), torch.cat(labels)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every part is in the mode it was in, also after an error.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer): layer.training
    False
    >>> layer.training
    True
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of test rows whose label their k nearest training rows vote for.

    Near means cosine similarity s; a neighbour's vote weighs exp(s / temperature), as in DINO (arXiv 2104.14294) and
    instance discrimination before it. Equal sums go to the lower label, a zero row has similarity 0 to all.

    Args:
        train_x, test_x: features [M, D] and [T, D], floats on one device.
        train_y, test_y: integer labels [M] and [T].
        k: neighbours; capped at M.
        temperature: above 0; large values give plain majority votes.

    Returns:
        accuracy in 0..1.

    Raises:
        ValueError: shapes that do not belong together, no rows, k or temperature not positive, features not finite.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> y = torch.tensor([3, 3, 5, 5])
    >>> knn_accuracy(x, y, torch.tensor([[2.0, 0.1], [0.1, 2.0]]), torch.tensor([3, 5]), k=2)
    1.0
    """
    _check(train_x, train_y, test_x, test_y)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    classes, train_class = train_y.unique(return_inverse=True)
    train_unit = F.normalize(train_x.float(), dim=1)
    right = 0
    for chunk, truth in zip(test_x.split(CHUNK), test_y.split(CHUNK), strict=True):
        with torch.autocast(chunk.device.type, enabled=False):  # float32 in a bfloat16 run too
            similarity = F.normalize(chunk.float(), dim=1) @ train_unit.T
        nearest, index = similarity.topk(min(k, len(train_x)), dim=1)
        # relative to the nearest one: the votes' ratios stay, and no exponential overflows
        weight = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), len(classes), device=weight.device)
        votes.scatter_add_(1, train_class[index], weight)
        right += int((classes[votes.argmax(1)] == truth).sum())
    return right / len(test_x)


def linear_probe_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, max_iterations: int = 1000
) -> float:
    """Share of test rows that a linear classifier trained on frozen features gets right.

    Features are standardised with the training rows' mean and deviation; then scikit-learn's multinomial logistic
    regression (L2 with C = 1, L-BFGS, float64): no random number is drawn, equal input gives equal output.

    Args:
        train_x, test_x: features [M, D] and [T, D], floats.
        train_y, test_y: integer labels [M] and [T]; at least two classes in train_y.
        max_iterations: L-BFGS steps at most.

    Returns:
        accuracy in 0..1.

    Raises:
        ValueError: shapes that do not belong together, no rows, fewer than two classes, features not finite.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> y = torch.tensor([3, 3, 5, 5])
    >>> linear_probe_accuracy(x, y, torch.tensor([[2.0, 0.1], [0.1, 2.0]]), torch.tensor([3, 5]))
    1.0
    """
    _check(train_x, train_y, test_x, test_y)
    if len(train_y.unique()) < 2:
        raise ValueError(f"train_y must hold at least two classes, got {train_y.unique().tolist()}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iterations))
    probe.fit(train_x.double().cpu().numpy(), train_y.cpu().numpy())
    return float(probe.score(test_x.double().cpu().numpy(), test_y.cpu().numpy()))


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
            shapes = f"{list(x.shape)} and {list(y.shape)}"
            raise ValueError(f"{name}_x must be [M, D] and {name}_y [M] with M > 0, got {shapes}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}_x must be finite, got {int((~torch.isfinite(x)).sum())} values that are not")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"test_x must have train_x's {train_x.shape[1]} columns, got {test_x.shape[1]}")
