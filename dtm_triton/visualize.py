"""Pictures: morphed groups over their images, masks, attention maps, reconstructions, and the curves of a run.

matplotlib is imported when a picture is drawn, through its object interface: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtm_triton import canvas
from dtm_triton.canvas import INK
from dtm_triton.groups import TokenGroups
from dtm_triton.visualize_masks import draw_maps, draw_masks, draw_reconstructions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curves", "draw_groups", "draw_maps", "draw_masks", "draw_reconstructions"]

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#5f3dc4", "#e67700")


def draw_groups(
    images: Tensor,
    groups_by_step: Sequence[TokenGroups],
    grid: tuple[int, int],
    path: Path | str,
    titles: Sequence[str] | None = None,
) -> Path:
    """Images beside their morphed groups: a row per image, a column per step of a schedule.

    Every group is filled with its mean colour, a thin line runs between different groups.

    Args:
        images: [B, 3, H, W] or [B, 1, H, W], floats in 0..1, H and W multiples of the grid's sides.
        groups_by_step: for every step the TokenGroups of all B images; index [B, N] with N = h * w of the grid.
        grid: (height, width) in patches.
        path: the PNG to write; folders on the way are made.
        titles: one per step; by default "36 groups" and so on.

    Returns:
        the path.

    Raises:
        ValueError: shapes that do not belong together.

    >>> import tempfile
    >>> halves = TokenGroups(torch.tensor([[0, 0, 1, 1]]).int(), torch.tensor([[2, 2]]).int())
    >>> draw_groups(torch.rand(1, 3, 8, 8), [halves], (2, 2), Path(tempfile.mkdtemp(), "groups.png")).name
    'groups.png'
    """
    patches = canvas.check_images(images, grid)
    for groups in groups_by_step:
        if groups.index.shape != (len(images), patches):
            raise ValueError(f"groups_by_step must hold [{len(images)}, {patches}], got {list(groups.index.shape)}")
    if titles is None:
        titles = [_count_title(groups) for groups in groups_by_step]
    if len(titles) != len(groups_by_step):
        raise ValueError(f"titles must be one per step, {len(groups_by_step)}, got {len(titles)}")
    figure, axes = canvas.picture_grid(len(images), 1 + len(groups_by_step), images.shape[-2:], ["image", *titles])
    for row, image in enumerate(images.detach().float().cpu()):
        canvas.show(axes[row][0], image)
        for column, groups in enumerate(groups_by_step, start=1):
            labels = groups.index[row].long().cpu().view(grid)
            canvas.show(axes[row][column], _fill_groups(image, labels))
            canvas.draw_borders(axes[row][column], labels, image)
    return canvas.save(figure, path)


def _count_title(groups: TokenGroups) -> str:
    """How many groups there are; under a threshold images differ."""
    fewest, most = (int(bound) for bound in groups.count.aminmax())
    if fewest < most:
        return f"{fewest} to {most} groups"
    return f"{most} group{'s' if most != 1 else ''}"


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Loss, learning rate and accuracies of a run, a panel each, over its steps.

    Args:
        rows: the lines of metrics.jsonl. "step" is the horizontal axis (the row's number where it is missing). Numbers
            whose name holds "loss" share the first panel, "lr" or "learning_rate" fill the second, and those with
            "knn", "probe" or "accuracy" in their name, fractions in 0..1, the third. Others are left out.
        path: the PNG to write; folders on the way are made.

    Returns:
        the path.

    Raises:
        ValueError: nothing to draw in any row.

    >>> import tempfile
    >>> rows = [{"step": 0, "loss": 2.0, "lr": 1e-3}, {"step": 10, "loss": 1.0, "lr": 5e-4, "knn": 0.8}]
    >>> draw_curves(rows, Path(tempfile.mkdtemp(), "curves.png")).name
    'curves.png'
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "learning rate": {}, "accuracy": {}}
    for number, row in enumerate(rows):
        for name, value in row.items():
            panel = _panel_of(name)
            if panel and isinstance(value, int | float) and not isinstance(value, bool):
                panels[panel].setdefault(name, []).append((float(row.get("step", number)), float(value)))
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError(f"rows must hold a loss, a learning rate or an accuracy, got {len(rows)} rows without")
    figure = canvas.new_figure(4.6 * len(panels), 3.2)
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(1, len(panels), position)
        for colour, (name, points) in zip(COLOURS * len(curves), curves.items(), strict=False):
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=colour, label=name, marker="o" if len(points) < 30 else "", markersize=3.5)
        _style_panel(axis, title, len(curves) > 1 or title == "accuracy")
    return canvas.save(figure, path)


def _panel_of(name: str) -> str | None:
    last = name.lower().replace("/", "_")
    if "loss" in last:
        return "loss"
    if last in ("lr", "learning_rate") or last.endswith(("_lr", "_learning_rate")):
        return "learning rate"
    return "accuracy" if any(word in last for word in ("knn", "probe", "accuracy")) else None


def _style_panel(axis: Axes, title: str, legend: bool) -> None:
    axis.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold")
    axis.set_xlabel("step", fontsize=9, color=INK)
    axis.grid(True, color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK, length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    accuracy = title == "accuracy"
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %" if accuracy else f"{value:g}")
    if legend:
        axis.legend(fontsize=8, frameon=False, labelcolor=INK)


def _fill_groups(image: Tensor, labels: Tensor) -> Tensor:
    """image [3, H, W] with every pixel replaced by the mean colour of its patch's group; labels [h, w]."""
    label = canvas.to_pixels(labels, image.shape[-2:]).flatten()
    groups = int(label.max()) + 1
    total = torch.zeros(image.shape[0], groups).index_add_(1, label, image.flatten(1))
    mean = total / torch.bincount(label, minlength=groups).clamp(min=1)
    return mean[:, label].view_as(image)
