"""Cases computed with the released programs in float64, every decision separated by more than float32 rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS, DEVICE

from dtm_triton import morph, ops, tome

GOLDEN = Path(__file__).parent / "golden"
MORPH = sorted(GOLDEN.glob("morph_*.npz"))
TOME = sorted(GOLDEN.glob("tome_*.npz"))
SMALL_BYTES = 10_000
"""Larger files hold more tokens than the interpreter gets through in seconds when tiles are tiny."""


def load(path: Path) -> dict[str, Any]:
    with np.load(path) as data:
        arrays = {name: torch.from_numpy(data[name]) if data[name].ndim else data[name].item() for name in data}
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arrays.items()}


def over_cases(paths: list[Path]) -> pytest.MarkDecorator:
    cases = [
        pytest.param(path, backend, id=f"{path.stem}-{backend}")
        for path in paths
        for backend in BACKENDS
        if backend != "triton-small" or DEVICE.type == "cuda" or path.stat().st_size < SMALL_BYTES
    ]
    return pytest.mark.parametrize(("path", "backend"), cases, indirect=["backend"])


def test_all_cases_are_here() -> None:
    assert len(MORPH) == 37 and len(TOME) == 16


@over_cases(MORPH)
def test_morph(path: Path, backend: str) -> None:
    case = load(path)
    groups = morph.match_tokens(
        case["features"], case["removed"].tolist(), num_protected=case["num_protected"], backend=backend
    )
    assert groups.index.equal(case["group_id"])
    outputs = case["outputs"].requires_grad_()
    loss = morph.morph_loss(outputs, case["features"], groups, backend=backend)
    loss.backward()
    assert outputs.grad is not None
    assert abs(loss.item() / case["loss"] - 1) < 1e-5
    assert (outputs.grad - case["grad"]).abs().max() < 1e-5 * case["grad"].abs().max()

    whole = morph.dtm_loss(
        outputs,
        case["features"],
        morph.MorphSchedule(case["removed"].tolist()),
        num_protected=case["num_protected"],
        backend=backend,
    )
    assert abs(whole.item() / case["loss"] - 1) < 1e-5


@over_cases(TOME)
def test_tome(path: Path, backend: str) -> None:
    case = load(path)
    merge, unmerge = tome.bipartite_soft_matching(
        case["metric"], case["r"], case["class_token"], case["distill_token"], backend=backend
    )
    x = case["x"]
    for mode in ("mean", "sum", "amax"):
        torch.testing.assert_close(merge(x, mode=mode), case[mode], rtol=1e-5, atol=1e-5)
    assert tome.merge_source(merge, x).cpu().equal(case["source"].cpu().to(x.dtype))
    together = merge(x, mode="mean")
    if case["distill_token"]:  # the released unmerge forgets that the distillation token has moved to the front
        stay = (x.shape[1] + 1) // 2 - (x.shape[1] - together.shape[1])
        front, moved = together[:, :1], together[:, stay : stay + 1]
        together = torch.cat([front, moved, together[:, 1:stay], together[:, stay + 1 :]], 1)
    torch.testing.assert_close(unmerge(together), case["unmerged"], rtol=1e-5, atol=1e-5)
    merged, size = tome.merge_wavg(merge, x)
    torch.testing.assert_close(merged, case["wavg"], rtol=1e-5, atol=1e-5)
    assert size.equal(case["size"])


def test_a_wrong_tie_rule_would_show() -> None:
    """The cases have teeth: giving one merged token to another group changes what they compare."""
    case = load(MORPH[0])
    wrong = case["group_id"].clone()
    token = wrong[0].bincount()[wrong[0].long()].argmax()  # one of several in its group
    wrong[0, token] = (wrong[0, token] + 1) % (wrong.max() + 1)
    size = ops.group_sizes(wrong, int(wrong.max()) + 1)
    loss = morph.morph_loss(case["outputs"], case["features"], morph.TokenGroups(wrong, size)).item()
    assert abs(loss / case["loss"] - 1) > 1e-5
