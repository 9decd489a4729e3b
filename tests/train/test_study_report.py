"""The study's statistics: intervals, paired differences, Holm's correction, tables and the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtm_triton.train.study import report


def fake(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "linear_probe": value, "knn": value / 2, "seconds": 1.0}
        for arm, row in values.items()
        for seed, value in enumerate(row)
    ]


def test_intervals_are_students() -> None:
    from scipy import stats

    values = [3.0, 5.0, 4.0, 8.0, 1.0]
    mean = report.mean_of(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high))
    assert report.mean_of([2.0]) == (2.0, math.inf)


def test_intervals_cover_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    means = [report.mean_of(list(draw.normal(3, 2, 10))) for _ in range(2000)]
    share = np.mean([abs(mean.value - 3) <= mean.half for mean in means])
    assert 0.935 < share < 0.965


def test_differences_are_paired_by_seed() -> None:
    from scipy import stats

    mae, amt = [0.50, 0.60, 0.40, 0.55], [0.52, 0.61, 0.43, 0.54]
    runs = fake({"mae": mae, "amt": amt, "reversed": [0.1, 0.3, 0.2]})
    found = report.differences(list(reversed(runs)))
    assert list(found) == [(arm, metric) for arm in ("amt", "reversed") for metric in ("linear_probe", "knn")]
    gain = found["amt", "linear_probe"]
    assert gain.mean.value == pytest.approx(1.25) and (gain.wins, gain.seeds) == (3, 4)
    assert found["reversed", "knn"].seeds == 3 and found["reversed", "knn"].wins == 0
    p = [stats.ttest_rel(ours, theirs).pvalue for ours, theirs in ((amt, mae), ([0.1, 0.3, 0.2], mae[:3]))]
    # the family has four members, two for every arm; kNN's are halves here and have the same p
    wanted = sorted([p[0], p[0], p[1], p[1]])
    holm = np.maximum.accumulate([min(1, (4 - rank) * value) for rank, value in enumerate(wanted)])
    assert sorted(item.p for item in found.values()) == pytest.approx(list(holm))


def test_equal_arms_and_constant_gains() -> None:
    runs = fake({"mae": [0.5, 0.25, 0.75], "amt": [0.5, 0.25, 0.75], "uniform": [0.75, 0.5, 1.0]})
    found = report.differences(runs)
    assert found["amt", "knn"].p == 1.0 and found["amt", "knn"].wins == 0 and found["amt", "knn"].mean == (0.0, 0.0)
    assert found["uniform", "knn"].p == 0.0 and found["uniform", "knn"].wins == 3


def test_holm_against_numbers_worked_out_by_hand() -> None:
    assert report.holm([0.005, 0.011, 0.02, 0.04, 0.13]) == pytest.approx([0.025, 0.044, 0.06, 0.08, 0.13])
    assert report.holm([0.9, 0.8]) == [1.0, 1.0]
    assert report.holm([]) == []


def test_tables_say_what_was_measured() -> None:
    text = report.render(fake({"mae": [0.5, 0.6], "amt": [0.55, 0.66], "digits mae": [0.9, 0.8]}))
    assert "| mae | MAE: masked at random | 48 / 0 / 16 | 55.0 ± 63.5 | 27.5 ± 31.8 |" in text
    assert "| amt less mae | +5.5 ± 6.4 | 2 of 2 | 0.115 | +2.8 ± 3.2 | 2 of 2 | 0.115 |" in text
    assert "**Digits**, 2 seeds" in text and "digits amt" not in text


def test_the_picture_shows_every_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    save = report.canvas.save
    monkeypatch.setattr(report.canvas, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    report.draw(
        fake({"mae": [0.5, 0.6, 0.7], "amt": [0.55, 0.66, 0.7], "uniform": [0.4, 0.5, 0.6]}), tmp_path / "d.png"
    )
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["uniform less mae", "amt less mae"]
    assert sorted(left.lines[1].get_xdata()) == pytest.approx([-10, -10, -10])
    assert [axis.get_title(loc="left") for axis in (left, right)] == [
        "linear probe, difference in points",
        "kNN, difference in points",
    ]
