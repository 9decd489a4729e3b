"""What the study's runs say: means and paired differences with intervals, as tables and as a picture.

All intervals are Student's, 95 %, over seeds. p values are of paired t tests, two-sided, corrected by Holm's method as
one family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtm_triton import canvas
from dtm_triton.measure.tables import table
from dtm_triton.train.study.design import ARMS, COMPARISONS, METRICS, masks_of

TITLES = {"linear_probe": "linear probe", "knn": "kNN"}
Runs = Sequence[Mapping[str, Any]]


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    half: float
    """Half of its 95 % interval."""


class Difference(NamedTuple):
    """An arm less its base, over seeds."""

    mean: Mean
    wins: int
    """Seeds in which the arm is better."""
    seeds: int
    p: float
    """Of a paired t test, corrected."""


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and half of Student's 95 % interval; infinite for one value.

    >>> mean_of([1.0, 2.0, 3.0])
    Mean(value=2.0, half=2.484...)
    """
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return Mean(float(values[0]), math.inf)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(float(np.mean(values)), float(t.ppf(0.975, count - 1)) * error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def scores(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """By seed, in percent."""
    return {run["seed"]: 100 * run[metric] for run in runs if run["arm"] == arm}


def differences(runs: Runs) -> dict[tuple[str, str], Difference]:
    """Of every comparison of the design that has two seeds or more in both arms, by (arm, metric)."""
    found: dict[tuple[str, str], tuple[Mean, int, int]] = {}
    chances = []
    for arm, base, metric in COMPARISONS:
        ours, theirs = scores(runs, arm, metric), scores(runs, base, metric)
        both = [seed for seed in ours if seed in theirs]
        if len(both) < 2:
            continue
        gained = [ours[seed] - theirs[seed] for seed in both]
        found[arm, metric] = mean_of(gained), sum(gain > 0 for gain in gained), len(gained)
        chances.append(_chance(gained))
    corrected = holm(chances)
    return {key: Difference(*found[key], p) for key, p in zip(found, corrected, strict=True)}


def _chance(gained: Sequence[float]) -> float:
    """p of a t test against 0; equal values, which it cannot judge, decide by themselves."""
    from scipy.stats import ttest_1samp

    if np.ptp(gained) == 0:
        return 1.0 if gained[0] == 0 else 0.0
    return float(ttest_1samp(gained, 0.0).pvalue)


def render(runs: Runs) -> str:
    """Both tables of both sets of images, in Markdown."""
    found, parts = differences(runs), []
    for images in dict.fromkeys(arm.images for arm in ARMS.values()):
        names = [name for name, arm in ARMS.items() if arm.images == images and scores(runs, name, METRICS[0])]
        if names:
            parts += [f"**{images.capitalize()}**, {_seeds(runs, names)}.", _means(runs, names)]
            parts += [_differences(found, [name for name in names if (name, METRICS[0]) in found])]
    return "\n\n".join(part for part in parts if part)


def _seeds(runs: Runs, names: Sequence[str]) -> str:
    counts = sorted({len(scores(runs, name, METRICS[0])) for name in names})
    return f"{' or '.join(map(str, counts))} seeds; percent of held-out images right, mean ± half of a 95 % interval"


def _means(runs: Runs, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        cells = [_pm(mean_of(list(scores(runs, name, metric).values()))) for metric in METRICS]
        rows.append([name, ARMS[name].what, masks_of(name), *cells])
    return table(["arm", "what", "masked / thrown / visible", *(TITLES[metric] for metric in METRICS)], rows)


def _differences(found: Mapping[tuple[str, str], Difference], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        cells = []
        for metric in METRICS:
            gain = found[name, metric]
            p = "< 0.001" if gain.p < 0.001 else f"{gain.p:.3f}"
            cells += [_pm(gain.mean, "+.1f"), f"{gain.wins} of {gain.seeds}", p]
        rows.append([f"{name} less {ARMS[name].base}", *cells])
    heads = [head for metric in METRICS for head in (TITLES[metric], "better in", "p, Holm")]
    return table(["difference, points", *heads], rows) if rows else ""


def _pm(mean: Mean, form: str = ".1f") -> str:
    return f"{mean.value:{form}} ± {mean.half:.1f}"


def draw(runs: Runs, path: Path) -> Path:
    """Paired differences with their intervals, and every seed's as a dot; a panel for every metric."""
    found = differences(runs)
    names = [name for name in ARMS if (name, METRICS[0]) in found]
    figure = canvas.new_figure(9.6, 1.1 + 0.42 * len(names))
    for position, metric in enumerate(METRICS, start=1):
        axis = figure.add_subplot(1, len(METRICS), position)
        axis.axvline(0, color=canvas.INK, linewidth=0.8)
        for row, name in enumerate(names):
            base = ARMS[name].base
            assert base is not None
            ours, theirs = scores(runs, name, metric), scores(runs, base, metric)
            dots = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            gain = found[name, metric]
            axis.plot(dots, [row] * len(dots), "o", color="#868e96", markersize=3, alpha=0.6)
            axis.errorbar(gain.mean.value, row, xerr=gain.mean.half, fmt="D", color="#2563eb", markersize=5, capsize=3)
        labels = [f"{name} less {ARMS[name].base}" for name in names] if position == 1 else []
        axis.set_yticks(range(len(names)), labels or [""] * len(names), fontsize=9, color=canvas.INK)
        axis.invert_yaxis()
        axis.set_title(f"{TITLES[metric]}, difference in points", fontsize=10, color=canvas.INK, loc="left")
        axis.grid(True, axis="x", color="#d0d7de", linewidth=0.6)
        axis.tick_params(labelsize=8, colors=canvas.INK, length=0)
        for side in ("top", "right", "left", "bottom"):
            axis.spines[side].set_visible(False)
    return canvas.save(figure, path)
