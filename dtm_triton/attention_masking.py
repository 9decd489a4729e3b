"""Attention-driven masking and throwing (AMT): which patches a student predicts and which it never meets.

Patches are drawn one after another without replacement, in proportion to how much attention they get; the first are
masked, the next are thrown, the rest stay visible (arXiv 2211.15362). A map belongs to a whole image; a crop's weights
are its integrals over the crop's patches. `sampling` says how draws are made; on a GPU all of it is one launch.

Shapes: B images, grid h x w, N = h * w patches, units of unit x unit patches that share their fate, U of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dtm_triton.backend import choose_backend
from dtm_triton.partition import Partition, grid_of_units, patches_of_units
from dtm_triton.sampling import area_weights, draw_ranks

Part = Literal["masked", "thrown", "visible"]
Crop = Literal["exact", "released"]

ORDER: tuple[Part, Part, Part] = ("masked", "thrown", "visible")
CORNER = 2
"""Cells a side of the corner that the released program takes for nearly every crop."""


def crop_weights(
    maps: Tensor, places: Tensor, grid: tuple[int, int], *, flip: Tensor | None = None, crop: Crop = "exact"
) -> Tensor:
    """How much of its image's attention every patch of a crop covers.

    A map is constant within its cells and 0 outside the image; a patch's weight is its integral over the patch, in
    cells of the map. Only ratios within a row matter to `sample_partition`.

    Args:
        maps: [B, h0, w0] of whole images; uint8, float16, float32 or float64.
        places: float64 [B, 4], every crop's top, left, bottom and right as shares of its image's height and width. They
            may lie outside 0..1.
        grid: (h, w), the crop's patches.
        flip: bool [B], crops that are mirrored left to right after cropping; None: none is.
        crop: "exact"; or "released", for comparison: the released program indexes the map's crop by `i // height`, and
            so takes the map's top-left 2 x 2 cells for 95 % of all crops. Here every crop takes exactly these cells,
            spread over all of the crop, a quarter each, whatever `places` holds (of a map with one row or column:
            that one). What the program does with the other 5 % is not reproduced.

    Returns:
        float64 [B, h * w] in raster order.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes, devices or `crop` that do not fit.

    Source: AMT (arXiv 2211.15362).

    >>> maps, places = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[0.0, 0.25, 1.0, 1.0]], dtype=torch.float64)
    >>> crop_weights(maps, places, (1, 3)).tolist()  # a cell in two of the patches is halved
    [[0.5, 1.5, 1.5]]
    """
    _check_maps(maps, places, flip, crop)
    grid_of_units(grid, 1)
    if crop == "released":
        tall, wide = corner(maps)
        places = torch.tensor([0.0, 0.0, tall, wide], dtype=torch.float64, device=places.device).expand_as(places)
    weights = area_weights(maps, places, grid)
    if flip is None:
        return weights
    return torch.where(flip[:, None], weights.view(-1, *grid).flip(2).flatten(1), weights)


def sample_partition(
    weights: Tensor,
    seeds: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    num_thrown: int,
    *,
    unit: int = 1,
    temperature: float = 1.0,
    uniform: float = 0.01,
    order: Sequence[Part] = ORDER,
    backend: str | None = None,
) -> Partition:
    """Draws units without replacement in proportion to weights, and divides the patches by when theirs is drawn.

    A unit is drawn in proportion to (weight / the image's largest + uniform) ^ (1 / temperature). Weights that are NaN,
    infinite, negative or below 2.2e-308 count as 0. Where nothing is left, with uniform = 0, units come last in random
    order; so an image without any weight is divided at random.

    Args:
        weights: floats [B, U], units in raster order.
        seeds: int64 [B]. An image's partition is a function of its weights and its seed: the same bits on every device.
        grid: (h, w) in patches, multiples of `unit`.
        num_masked, num_thrown: patches of every image, multiples of unit^2; together at most N.
        unit: patches a side of a unit.
        temperature: below 1 the strongest are drawn more surely; positive.
        uniform: added to weights that were divided by the largest one; 0 or more.
        order: what the first units drawn become, the next and the last.
        backend: "portable", "triton" or None for the one that fits the device.

    Returns:
        Partition of int64 [B, M], [B, T], [B, V], each in raster order.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, counts or settings that do not fit.

    Source: AMT (arXiv 2211.15362).

    >>> weights = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    >>> sample_partition(weights, torch.tensor([3]), (2, 2), 2, 0, uniform=0.0).masked.tolist()
    [[1, 3]]
    """
    rows, columns = grid_of_units(grid, unit, num_masked, num_thrown)
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floats, got {weights.dtype}")
    if weights.dim() != 2 or weights.shape[1] != rows * columns:
        raise ValueError(f"weights must be [B, {rows * columns}], got {list(weights.shape)}")
    _check_rows(weights, "seeds", seeds, torch.int64, [len(weights)])
    _check_settings(temperature, uniform, order)
    if _on_gpu(backend, weights.device):
        from dtm_triton.kernels import sample

        return Partition(
            *sample.sample(weights, seeds, grid, num_masked, num_thrown, unit, temperature, uniform, tuple(order))
        )
    ranks = draw_ranks(weights, seeds, temperature, uniform)
    return _divide(ranks, grid, num_masked, num_thrown, unit, order)


def attention_partition(
    maps: Tensor,
    places: Tensor,
    seeds: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    num_thrown: int,
    *,
    flip: Tensor | None = None,
    crop: Crop = "exact",
    unit: int = 1,
    temperature: float = 1.0,
    uniform: float = 0.01,
    order: Sequence[Part] = ORDER,
    backend: str | None = None,
) -> Partition:
    """`sample_partition` with the weights that `crop_weights` gives for every unit; one launch on a GPU.

    Args and errors: those of the two functions; `grid` counts patches. With AMT's numbers for MAE:

    >>> maps, places = torch.rand(2, 14, 14), torch.tensor([[0.1, 0.0, 0.6, 0.5]], dtype=torch.float64).repeat(2, 1)
    >>> parts = attention_partition(maps, places, torch.tensor([1, 2]), (14, 14), 88, 78)
    >>> [part.shape[1] for part in parts]
    [88, 78, 30]
    """
    units = grid_of_units(grid, unit, num_masked, num_thrown)
    _check_maps(maps, places, flip, crop)
    _check_rows(maps, "seeds", seeds, torch.int64, [len(maps)])
    _check_settings(temperature, uniform, order)
    if _on_gpu(backend, maps.device):
        from dtm_triton.kernels import sample

        whole = corner(maps) if crop == "released" else (0.0, 0.0)
        crops = sample.Crops(maps, places, flip, whole)
        return Partition(
            *sample.sample(crops, seeds, grid, num_masked, num_thrown, unit, temperature, uniform, tuple(order))
        )
    weights = crop_weights(maps, places, units, flip=flip, crop=crop)
    ranks = draw_ranks(weights, seeds, temperature, uniform)
    return _divide(ranks, grid, num_masked, num_thrown, unit, order)


def corner(maps: Tensor) -> tuple[float, float]:
    """The height and width of the released program's corner as shares of maps [B, h0, w0]."""
    return min(CORNER, maps.shape[1]) / maps.shape[1], min(CORNER, maps.shape[2]) / maps.shape[2]


def _divide(
    ranks: Tensor, grid: tuple[int, int], num_masked: int, num_thrown: int, unit: int, order: Sequence[Part]
) -> Partition:
    """The partition by the units' ranks int64 [B, U]."""
    patches = grid[0] * grid[1]
    counts = {"masked": num_masked, "thrown": num_thrown, "visible": patches - num_masked - num_thrown}
    drawn, first = {}, 0
    for part in order:
        last = first + counts[part] // unit**2
        drawn[part] = patches_of_units((ranks >= first) & (ranks < last), grid, unit)
        first = last
    return Partition.of(drawn["masked"], drawn["thrown"], num_masked, num_thrown)


def _on_gpu(backend: str | None, device: torch.device) -> bool:
    if backend == "reference":
        raise ValueError("backend must be 'portable', 'triton' or None, got 'reference'")
    return choose_backend(backend, device) == "triton"


def _check_maps(maps: Tensor, places: Tensor, flip: Tensor | None, crop: str) -> None:
    if maps.dtype not in (torch.uint8, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"maps must be uint8, float16, float32 or float64, got {maps.dtype}")
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps must be [B, h0, w0] with cells, got {list(maps.shape)}")
    if crop not in ("exact", "released"):
        raise ValueError(f"crop must be 'exact' or 'released', got {crop!r}")
    _check_rows(maps, "places", places, torch.float64, [len(maps), 4])
    if flip is not None:
        _check_rows(maps, "flip", flip, torch.bool, [len(maps)])


def _check_rows(images: Tensor, name: str, values: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    """`values` belong to the images: on their device, in this dtype and shape."""
    if values.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {values.dtype}")
    if list(values.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {list(values.shape)}")
    if values.device != images.device:
        raise ValueError(f"{name} must be on {images.device}, got {values.device}")


def _check_settings(temperature: float, uniform: float, order: Sequence[str]) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    if not 0 <= uniform < math.inf:
        raise ValueError(f"uniform must be 0 or more, and finite, got {uniform!r}")
    if sorted(order) != sorted(ORDER):
        raise ValueError(f"order must hold each of {ORDER} once, got {order!r}")
