"""The launcher of the kernel that divides patches by drawing them in proportion to weights, given or from maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dtm_triton.kernels.sample_kernel import sample_kernel

MOST, CHUNK = 1024, 16
"""Units or patches that a program holds at once, and units that they are compared with at once."""


class Crops(NamedTuple):
    """Maps whose crops give the weights; see `attention_masking.crop_weights`."""

    maps: Tensor
    """uint8 or floats [B, h0, w0]."""
    places: Tensor
    """float64 [B, 4]."""
    flip: Tensor | None
    """bool [B]."""
    corner: tuple[float, float]
    """Height and width, as shares of the map, of the corner that stands in for every crop; 0: the crops' places."""


def sample(
    weights: Tensor | Crops,
    seeds: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    num_thrown: int,
    unit: int,
    temperature: float,
    uniform: float,
    order: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked, thrown and visible patches, int64 [B, M], [B, T], [B, V]; see `attention_masking.sample_partition`.

    weights: floats [B, U], or the crops that they come from; seeds: int64 [B].
    """
    crops = weights if isinstance(weights, Crops) else None
    values = weights.maps if isinstance(weights, Crops) else weights
    map_size = values.shape[1:] if crops else (0, 0)
    corner = crops.corner if crops else (0.0, 0.0)
    batch, patches = len(seeds), grid[0] * grid[1]
    counts = {"masked": num_masked, "thrown": num_thrown, "visible": patches - num_masked - num_thrown}
    device = seeds.device
    masked, thrown, visible = (
        torch.empty((batch, count), dtype=torch.int64, device=device) for count in counts.values()
    )
    if batch == 0:
        return masked, thrown, visible
    units = patches // unit**2
    before = {part: sum(counts[other] for other in order[:place]) // unit**2 for place, part in enumerate(order)}
    scratch = torch.empty((batch, 2, units), dtype=torch.float64, device=device)
    tile = min(MOST, triton.next_power_of_2(patches))
    with torch.cuda.device_of(seeds):
        sample_kernel[(batch,)](
            weights=values.contiguous(),
            places=crops.places.contiguous() if crops else None,
            flips=crops.flip.contiguous().view(torch.uint8) if crops and crops.flip is not None else None,
            seeds=seeds.contiguous(),
            scratch=scratch,
            masked=masked,
            thrown=thrown,
            visible=visible,
            HEIGHT=grid[0],
            WIDTH=grid[1],
            UNIT=unit,
            MAP_HEIGHT=map_size[0],
            MAP_WIDTH=map_size[1],
            CORNER_HEIGHT=corner[0],
            CORNER_WIDTH=corner[1],
            MASKED=num_masked,
            THROWN=num_thrown,
            FIRST_MASKED=before["masked"],
            FIRST_THROWN=before["thrown"],
            TEMPERATURE=float(temperature),
            UNIFORM=float(uniform),
            TILE=tile,
            CHUNK=CHUNK,
            num_warps=8 if tile > 512 else 4,
            enable_fp_fusion=False,  # PyTorch's operations round after every one of them
        )
    return masked, thrown, visible
