"""The kernel of block-wise masks gives the masks of PyTorch's operations, patch by patch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_gpu import DEVICE, needs_gpu

from dtm_triton import masking
from dtm_triton.masking import block_cover, block_rounds

CASES = [((14, 14), 75, 16), ((7, 16), 40, 4), ((6, 6), 36, 4), ((5, 3), 1, 16), ((1, 9), 5, 2), ((14, 14), 0, 16)]


@pytest.mark.parametrize(("grid", "masked", "least"), CASES)
@pytest.mark.parametrize("rounds", [None, 2])
def test_masks_are_equal(
    grid: tuple[int, int], masked: int, least: int, rounds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter; few rounds, so that the rest is filled."""
    patches = grid[0] * grid[1]
    draws = torch.rand(9, 5 * (rounds or block_rounds(patches, masked, least)) + patches)
    expected = block_cover(draws, grid, masked, min_patches=least)
    monkeypatch.setattr(masking, "choose_backend", lambda *_: "triton")
    found = block_cover(draws, grid, masked, min_patches=least)
    assert found.dtype == torch.bool and torch.equal(found, expected)
    assert found.sum(1).tolist() == [masked] * 9
    assert block_cover(draws[:0], grid, masked, min_patches=least).shape == (0, patches)


@needs_gpu
@pytest.mark.parametrize(("grid", "masked", "least"), CASES)
def test_masks_are_equal_on_a_gpu(grid: tuple[int, int], masked: int, least: int) -> None:
    patches = grid[0] * grid[1]
    draws = torch.rand(512, 5 * block_rounds(patches, masked, least) + patches)
    expected = block_cover(draws, grid, masked, min_patches=least)
    assert torch.equal(block_cover(draws.to(DEVICE), grid, masked, min_patches=least).cpu(), expected)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from dtm_triton.kernels.mask_kernel import cover_kernel
constants = {"HEIGHT": 14, "WIDTH": 14, "MASKED": 75, "LEAST": 16, "ROUNDS": 13, "BLOCK": 256}
signature = {"numbers": "*fp64", "scores": "*fp32", "masks": "*u8"} | dict.fromkeys(constants, "constexpr")
for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    source = triton.compiler.ASTSource(cover_kernel, signature, constants)
    triton.compile(source, target=target, options={"num_warps": 4})
    print(target.backend, target.arch)
"""


def test_it_compiles_without_a_gpu(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["cuda 90", "hip gfx942"]
