"""What the pictures are drawn on: figures, panels in a grid, images in them, lines between patches.

matplotlib is imported when a picture is drawn, through its object interface: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    AxesGrid = list[list[Axes]]

INK = "#24292f"
AMBER = "#f59f00"
CELL = 1.9  # inches a picture's longer side


def check_images(images: Tensor, grid: tuple[int, int]) -> int:
    """The patches of a grid (height, width) on images [B, C, H, W]; ValueError where they do not belong together."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be [B, 3, H, W] or [B, 1, H, W] with B > 0, got {list(images.shape)}")
    if images.shape[2] % grid[0] or images.shape[3] % grid[1]:
        raise ValueError(f"grid must divide the images' {list(images.shape[2:])} pixels, got {grid!r}")
    return grid[0] * grid[1]


def picture_grid(rows: int, columns: int, size: Sequence[int], titles: Sequence[str]) -> tuple[Figure, AxesGrid]:
    """Panels for images of a size (height, width), close together, a title above every column."""
    scale = CELL / max(size)
    wide, high = size[1] * scale, size[0] * scale
    gap, margin, heading = 0.08, 0.1, 0.3  # inches
    total_wide = columns * wide + (columns - 1) * gap + 2 * margin
    total_high = rows * high + (rows - 1) * gap + 2 * margin + heading
    figure = new_figure(total_wide, total_high)
    axes: AxesGrid = []
    for row in range(rows):
        bottom = margin + (rows - 1 - row) * (high + gap)
        axes.append([])
        for column in range(columns):
            left = margin + column * (wide + gap)
            axis = figure.add_axes((left / total_wide, bottom / total_high, wide / total_wide, high / total_high))
            axis.set_axis_off()
            axes[-1].append(axis)
            if row == 0:
                middle, above = left + wide / 2, total_high - margin - heading / 2
                figure.text(middle / total_wide, above / total_high, titles[column], ha="center", va="center",
                            fontsize=10, color=INK)  # fmt: skip
    return figure, axes


def show(axis: Axes, image: Tensor) -> None:
    """An image [C, H, W], floats in 0..1, C = 1 or 3."""
    pixels = image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    # pixel (0, 0) spans 0..1, so that patch edges lie on whole numbers; small images keep their square pixels
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest" if height < 128 else "antialiased")
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def draw_borders(axis: Axes, labels: Tensor, image: Tensor) -> None:
    """Lines between neighbouring patches of different label: vectors, so they stay thin at any resolution."""
    from matplotlib.collections import LineCollection

    high, wide = image.shape[1] / labels.shape[0], image.shape[2] / labels.shape[1]
    grey = bool((image.amax(0) - image.amin(0)).max() < 0.05)
    across = (labels[:, 1:] != labels[:, :-1]).nonzero().tolist()
    down = (labels[1:] != labels[:-1]).nonzero().tolist()
    lines = [[((x + 1) * wide, y * high), ((x + 1) * wide, (y + 1) * high)] for y, x in across]
    lines += [[(x * wide, (y + 1) * high), ((x + 1) * wide, (y + 1) * high)] for y, x in down]
    # white lines would pass for strokes of a black and white drawing
    axis.add_collection(LineCollection(lines, colors=AMBER if grey else "white", linewidths=0.7, capstyle="projecting"))


def to_pixels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """What is known of patches [h, w], of every pixel of an image of `size` (height, width)."""
    return labels.repeat_interleave(size[0] // labels.shape[0], 0).repeat_interleave(size[1] // labels.shape[1], 1)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | str) -> Path:
    """Write a PNG; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(axis.lines for axis in figure.axes):
        figure.tight_layout()
    figure.savefig(path)
    return path
