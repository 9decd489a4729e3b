"""The sampling kernel gives the partitions of PyTorch's operations, bit for bit, from weights and from maps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import DEVICE, needs_gpu
from torch import Tensor

from dtm_triton import attention_masking
from dtm_triton.attention_masking import ORDER, attention_partition, sample_partition
from dtm_triton.kernels import sample

CASES: dict[str, dict[str, Any]] = {
    "paper": dict(grid=(14, 14), num_masked=88, num_thrown=78),
    "units": dict(grid=(14, 14), num_masked=88, num_thrown=52, unit=2),
    "wide": dict(grid=(3, 11), num_masked=16, num_thrown=9, temperature=0.3, order=("thrown", "visible", "masked")),
    "tall-units": dict(grid=(9, 6), num_masked=18, num_thrown=9, unit=3, uniform=0.0, order=ORDER[::-1]),
    "no-mask": dict(grid=(4, 4), num_masked=0, num_thrown=5),
    "nothing-thrown": dict(grid=(4, 5), num_masked=11, num_thrown=0, temperature=4.0),
    "all-masked": dict(grid=(2, 3), num_masked=6, num_thrown=0),
    "none": dict(grid=(3, 3), num_masked=0, num_thrown=0),
    "all-thrown": dict(grid=(1, 5), num_masked=0, num_thrown=5),
    "one": dict(grid=(1, 1), num_masked=1, num_thrown=0),
    "sure": dict(grid=(6, 7), num_masked=20, num_thrown=12, temperature=1e-300, uniform=0.0),
    "flat": dict(grid=(6, 7), num_masked=20, num_thrown=12, temperature=1e300, uniform=1e308),
}
LARGE: dict[str, dict[str, Any]] = {
    "1024": dict(grid=(32, 32), num_masked=460, num_thrown=409),
    "2304": dict(grid=(48, 48), num_masked=1000, num_thrown=900, unit=2),
}
ROWS = 8
BROKEN = [0.0, math.nan, math.inf, -1.0, 1e-310, 1.0, 1.0, 0.5]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel where it runs on CPU tensors, or on a GPU's."""
    monkeypatch.setattr(attention_masking, "choose_backend", lambda backend, _: backend or "portable")


def make_weights(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random ones, no weight at all, equal ones, and images where every cell may be broken; seeds of all sizes."""
    generator = torch.Generator().manual_seed(0)
    units = case["grid"][0] * case["grid"][1] // case.get("unit", 1) ** 2
    weights = torch.rand(ROWS, units, generator=generator, dtype=torch.float64)
    weights[2], weights[3] = 0.0, 7.0
    weights[4:6] = torch.tensor(BROKEN, dtype=torch.float64)[torch.randint(8, (2, units), generator=generator)]
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 5, 6, 2**32, 2**31])
    return weights.to(dtype), seeds


def make_maps(dtype: torch.dtype, size: tuple[int, int] = (5, 7)) -> dict[str, Tensor]:
    """Crops inside, outside, around, of nothing and of no number."""
    generator = torch.Generator().manual_seed(1)
    maps = (torch.rand(ROWS, *size, generator=generator) * 255).to(dtype)
    if dtype.is_floating_point:
        maps[6, ::3, ::2], maps[6, 1, 1], maps[6, 2, 2] = torch.nan, torch.inf, -3.0
    places = torch.rand(ROWS, 4, generator=generator, dtype=torch.float64)
    places[:, 2:] += places[:, :2]
    places[1] = torch.tensor([-0.3, -0.1, 1.2, 1.7])
    places[2] = torch.tensor([1.2, 0.0, 1.7, 1.0])
    places[3] = torch.tensor([0.2, 0.8, 0.2, 0.1])
    places[4] = torch.tensor([0.0, math.nan, math.inf, 1.0])
    places[5:7] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return {"maps": maps, "places": places, "seeds": torch.arange(ROWS) - 3, "flip": torch.arange(ROWS) % 2 == 0}


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.int64 and torch.equal(one.cpu(), other)


@pytest.mark.parametrize("name", [*CASES, "1024"])
def test_equal_from_weights(name: str, interpreted: None, guard: Any) -> None:
    """In guarded memory: what the launcher allocates is poisoned and lies between bands that nothing may touch."""
    case = (CASES | LARGE)[name]
    weights, seeds = make_weights(case)
    few = slice(None) if name in CASES else slice(2)
    expected = sample_partition(weights[few], seeds[few], **case)
    assert_equal(sample_partition(weights[few], seeds[few], **case, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_equal_from_weights_of_any_dtype(dtype: torch.dtype, interpreted: None) -> None:
    weights, seeds = make_weights(CASES["paper"], dtype)
    expected = sample_partition(weights, seeds, **CASES["paper"])
    assert_equal(sample_partition(weights, seeds, **CASES["paper"], backend="triton"), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of infinity times 0
@pytest.mark.parametrize("crop", ["exact", "released"])
@pytest.mark.parametrize(
    ("name", "dtype", "flipped"),
    [
        ("paper", torch.uint8, True),
        ("paper", torch.float16, False),
        ("tall-units", torch.float64, True),
        ("one", torch.float32, False),
    ],
)
def test_equal_from_maps(
    name: str, dtype: torch.dtype, flipped: bool, crop: Any, interpreted: None, guard: Any
) -> None:
    case = CASES[name] | make_maps(dtype) | {"crop": crop}
    case["flip"] = case["flip"] if flipped else None
    assert_equal(attention_partition(**case, backend="triton"), attention_partition(**case))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    place=st.tuples(*[st.floats(-0.3, 1.4)] * 4),
    seed=st.integers(-(2**63), 2**63 - 1),
    scale=st.sampled_from([1.0, 2.0**-1000, 1e300]),
)
def test_equal_for_any_crop(size: Any, grid: Any, place: Any, seed: int, scale: float) -> None:
    """Coarse maps and fine ones, patches that touch one cell or all of them."""
    generator = torch.Generator().manual_seed(seed % 2**62)
    maps = torch.rand(1, *size, generator=generator, dtype=torch.float64) * scale
    places, seeds = torch.tensor([place], dtype=torch.float64), torch.tensor([seed])
    patches = grid[0] * grid[1]
    masked, thrown = patches // 2, patches // 4
    expected = attention_partition(maps, places, seeds, grid, masked, thrown, uniform=0.0)
    crops = sample.Crops(maps, places, None, (0.0, 0.0))
    assert_equal(sample.sample(crops, seeds, grid, masked, thrown, 1, 1.0, 0.0, ORDER), expected)


def test_equal_when_tiles_are_many(interpreted: None, monkeypatch: pytest.MonkeyPatch, guard: Any) -> None:
    """What a program holds at once is smaller than the image: counts are carried from one tile to the next."""
    monkeypatch.setattr(sample, "MOST", 16)
    monkeypatch.setattr(sample, "CHUNK", 8)
    for name in ("wide", "tall-units"):
        case = CASES[name] | {"uniform": 1.0}  # so that much hangs on the largest weight of all tiles
        weights, seeds = make_weights(case)
        expected = sample_partition(weights, seeds, **case)
        assert_equal(sample_partition(weights, seeds, **case, backend="triton"), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_strided_inputs(interpreted: None) -> None:
    maps = make_maps(torch.uint8)
    turned = {name: torch.stack([value, value], -1)[..., 0] for name, value in maps.items()}
    assert not turned["places"].is_contiguous() and not turned["flip"].is_contiguous()
    found = attention_partition(**turned, **CASES["paper"], backend="triton")
    assert_equal(found, attention_partition(**maps, **CASES["paper"]))


def test_no_images(interpreted: None) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    parts = sample_partition(torch.empty(0, 196), empty, **CASES["paper"], backend="triton")
    assert [part.shape for part in parts] == [(0, 88), (0, 78), (0, 30)]
    maps, places = torch.empty(0, 14, 14), torch.empty(0, 4, dtype=torch.float64)
    assert attention_partition(maps, places, empty, **CASES["units"], backend="triton").visible.shape == (0, 56)


@needs_gpu
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_equal_on_a_gpu(name: str) -> None:
    """By default, and PyTorch's operations there too."""
    case = (CASES | LARGE)[name]
    weights, seeds = make_weights(case)
    weights, seeds = weights.repeat(64, 1), torch.arange(64 * ROWS) * 2**55
    expected = sample_partition(weights, seeds, **case)
    for backend in (None, "portable"):
        assert_equal(sample_partition(weights.to(DEVICE), seeds.to(DEVICE), **case, backend=backend), expected)
    for dtype in (torch.uint8, torch.float16):
        for crop in ("exact", "released"):
            here = {key: value.repeat_interleave(16, 0) for key, value in make_maps(dtype).items()}
            here["seeds"] = torch.arange(16 * ROWS)
            expected = attention_partition(**here, **case, crop=crop)
            there = {key: value.to(DEVICE) for key, value in here.items()}
            for backend in (None, "portable"):
                assert_equal(attention_partition(**there, **case, crop=crop, backend=backend), expected)


COMPILE = """
import json, re, struct, triton
from dtm_triton import sampling
from dtm_triton.kernels import recording, resource_launches, resources
fused, constants = {}, []
for target in ("sm_90", "gfx942"):
    with recording.recording(target) as recorded:
        resource_launches.situations(target)["sample"]()
    assert len(recorded) == 1, "one launch"
    recorded[0].arguments["TEMPERATURE"] = 0.3
    source, options = recording.specialised(recorded[0])
    for fusing in (False, True):
        changed = options | {"enable_fp_fusion": True} if fusing else options
        asm = triton.compile(source, target=resources.TARGETS[target], options=changed).asm
        text = asm.get("ptx") or asm["amdgcn"]
        fused[f"{target} {fusing}"] = len(re.findall(r"fma[.a-z_]*f64", text))
        constants += re.findall("0d([0-9A-F]{16})", text)
doubles = [struct.unpack(">d", bytes.fromhex(constant))[0] for constant in constants]
wanted = [*sampling.TERMS, sampling.LN2, sampling.ROOT2, sampling.TINY, 2.0**-52, 0.01, 0.3]
print(json.dumps([fused, [number for number in wanted if number not in doubles]]))
"""


def test_no_product_and_no_constant_is_rounded_otherwise(tmp_path: Path) -> None:
    """Machine code has no multiplication contracted with an addition, as the compiler makes them where it may, and no
    constant that went through float32."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    fused, lost = json.loads(done.stdout)
    assert fused["sm_90 False"] == 0 < fused["sm_90 True"], fused
    # on AMD a division is made of them as well
    assert fused["gfx942 False"] < fused["gfx942 True"], fused
    assert lost == []
