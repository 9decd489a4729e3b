"""Every setting that tuning may choose is legal and gives the reference's results.

Kernels are run with the candidates' own tiles on small inputs. Warps, stages, and registers mean nothing to the
interpreter: on a machine without a GPU candidates that differ only there count as one, and some are compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels import launch, settings, stream_match, stream_settings, tables
from dtm_triton.measure import candidates as listed
from dtm_triton.measure.candidates import MOST, SINGLES, TOGETHER, candidates, legal

UNSEEN = ("num_warps", "num_stages", "gram_warps", "gram_stages", "select_warps", "max_registers", "max_programs")
HALF, SINGLE = torch.bfloat16, torch.float32


def defaults() -> dict[tuple[str, str], Any]:
    """The default settings of every op in every bucket that a test of reasonable size can mean."""
    with tables.asked() as found:
        for tokens, dtype, tasks in product((50, 100, 196, 500, 1000), (HALF, SINGLE), (8, 256)):
            settings.match_settings(tokens, dtype, tasks, "any")
        for tokens, groups, channels in product((196,), (98, 8), (16, 64, 512)):
            settings.group_settings(tokens, groups, channels, "any")
        for channels, batch in product((16, 64, 512), (8, 128)):
            settings.loss_settings(channels, batch, "any")
        for channels in (16, 64, 128, 384, 768, 2048):
            settings.row_loss_settings(channels, "any")
            settings.gather_settings(channels, "any")
        settings.count_settings("any")
        for tokens, channels, dtype, family in product((577, 4096), (64, 320), (HALF, SINGLE), ("sm_90", "sm_80")):
            stream_settings.stream_settings(tokens, channels, dtype, family)
    return found


def chosen() -> list[tuple[str, dict[str, Any]]]:
    """All settings that tuning may choose, whole; without a GPU those that the interpreter tells apart."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for (op, bucket), default in defaults().items():
        for changed in ({}, *candidates(op, bucket, default, "sm_90")):
            values = asdict(replace(default, **changed))
            values.pop("slots", None)  # follows from the tokens
            if op == "row_loss":
                values.pop("channels")  # rows are as wide as the inputs' channels
            seen = values if DEVICE.type == "cuda" else {k: v for k, v in values.items() if k not in UNSEEN}
            found.setdefault(repr((op, seen)), (op, values))
    return list(found.values())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def groups(tokens: int, *removed: list[int]) -> tuple[Tensor, ...]:
    """index [L, 1, N], size and members of some matching."""
    options: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False)
    found = reference.match(normal(1, tokens, 8, seed=9).cpu(), torch.tensor(removed), 0, **options)
    return tuple(part.to(DEVICE) for part in found)


def run_match() -> None:
    x, removed = normal(1, 35, 20), torch.tensor([[9, 7]], dtype=torch.int32)
    options: dict[str, Any] = dict(num_protected=1, random_split=True, keep_order=True)
    *found, merged = launch.match(x, removed, torch.tensor([3]), **options, merge_rows=19)
    wanted = reference.match(x.cpu(), removed, 3, **options)
    assert all(torch.equal(left.cpu(), right) for left, right in zip(found, wanted, strict=True))
    means = reference.merge(x, found[0][0], found[1][0, :, :19], "mean")
    torch.testing.assert_close(merged, means, rtol=1e-5, atol=1e-5)


def run_stream() -> None:
    x, removed = normal(1, 70, 20), torch.tensor([[20]], dtype=torch.int32)
    options: dict[str, Any] = dict(num_protected=1, random_split=False, keep_order=True, threshold=None)
    found = stream_match.stream_match(x, removed.to(DEVICE), removed, **options)
    wanted = reference.match(x.cpu(), removed, 0, **options)
    assert all(torch.equal(left.cpu(), right) for left, right in zip(found, wanted, strict=True))


def run_groups() -> None:
    index, size, members = (part[0] for part in groups(31, [9, 5]))
    x, size = normal(1, 31, 21), size[:, :17]
    assert torch.equal(launch.merge(x, members, size, "amax"), reference.merge(x, index, size, "amax"))
    torch.testing.assert_close(launch.morph(x, members, size), reference.morph(x, index, size), rtol=1e-5, atol=1e-5)


def run_loss(kind: str, standardize: bool, channels: int, *schedules: list[int]) -> None:
    index, size, members = groups(31, [9, 5], *schedules)
    options: dict[str, Any] = dict(kind=kind, beta=0.5, normalize_target=standardize)
    outputs, targets = normal(1, 31, channels), normal(1, 31, channels, seed=1)
    x = outputs.double().requires_grad_()
    wanted = reference.loss(x, targets.double(), index, size, **options)
    (slope,) = torch.autograd.grad(wanted, x)
    value, slopes = launch.loss_forward(outputs, targets, members, size, save=True, **options)
    assert abs(value.item() - wanted.item()) < 1e-5
    scale = 1 / (index.numel() * (1 if kind == "cosine" else channels))
    grad = launch.loss_backward(torch.ones((), device=DEVICE), slopes, scale, torch.float32)
    torch.testing.assert_close(grad, slope.float(), rtol=1e-4, atol=1e-6)


def run_gather() -> None:
    index = groups(31, [9, 5])[0][0]
    merged = normal(1, 17, 21)
    assert torch.equal(launch.unmerge(merged, index), reference.unmerge(merged, index))


def run_count() -> None:
    index = groups(31, [9, 5])[0][0]
    assert torch.equal(launch.group_members(index, 17), index.sort(dim=1, stable=True).indices.int())


RUNS: dict[str, Callable[[], None]] = {
    "match": run_match,
    "groups": run_groups,
    "loss": lambda: run_loss("smooth_l1", False, 21, [3, 0]),
    "row_loss": lambda: run_loss("cosine", True, 13),
    "gather": run_gather,
    "count": run_count,
    "stream": run_stream,
}


def test_every_op_has_candidates() -> None:
    ops = {op for op, _ in defaults()}
    assert SINGLES.keys() == TOGETHER.keys() == ops == RUNS.keys()


@pytest.mark.parametrize("op", RUNS)
def test_every_candidate_computes_what_the_reference_does(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the inputs ask for, they get the candidate."""
    tried = [values for name, values in chosen() if name == op]
    assert len(tried) > 4
    for values in tried:

        def tuned(default: Any, name: str, *_: Any, values: dict[str, Any] = values) -> Any:
            return replace(default, **values) if name == op else default

        for module in (settings, stream_settings):
            monkeypatch.setattr(module, "tuned", tuned)
        try:
            RUNS[op]()
        except Exception as error:
            raise AssertionError(f"{op} {values}") from error


def test_candidates_are_few_legal_and_different() -> None:
    for (op, bucket), default in defaults().items():
        found = candidates(op, bucket, default, "sm_90")
        assert 4 <= len(found) <= MOST, (op, bucket, len(found))
        names = {field.name for field in fields(default)}
        for changed in found:
            assert changed and changed.keys() <= names and "slots" not in changed
            assert all(getattr(default, name) != value for name, value in changed.items()), (op, changed)
            assert legal(op, bucket, replace(default, **changed), default, "sm_90")
        assert len({repr(sorted(changed.items())) for changed in found}) == len(found)


@pytest.mark.parametrize(
    "changed",
    [
        {"match_rows": 48},
        {"gram_channels": 8},
        {"num_warps": 16, "max_registers": 224},
        {"gram_rows": 128, "gram_warps": 2},
        {"gram_rows": 128, "gram_channels": 256, "gram_warps": 8},
        {"match_rows": 512, "match_columns": 512},
        {"max_registers": 300},
    ],
    ids=str,
)
def test_what_cannot_be_launched_is_not_legal(changed: dict[str, int]) -> None:
    default = settings.match_settings(196, HALF, 256, "any")
    assert legal("match", "n256 half many", default, default, "sm_90")
    assert not legal("match", "n256 half many", replace(default, **changed), default, "sm_90")


def test_less_shared_memory_allows_less() -> None:
    default = settings.match_settings(196, HALF, 256, "any")
    wide = replace(default, gram_rows=128, gram_channels=64, gram_warps=8)
    assert [legal("match", "n256 half many", wide, default, family) for family in ("sm_90", "gfx942")] == [True, False]
    assert not legal("match", "n256 single many", replace(wide, gram_channels=128), default, "sm_80")


def test_extreme_candidates_compile(tmp_path: Path) -> None:
    """The largest tiles of each kind, for one target: they need not be good, but there is code for them."""
    code = """
import json, torch
from dtm_triton.kernels import resource_launches as calls, resources, tables
from dtm_triton.kernels.recording import recording
found = {}
for op, bucket, fields, call in (
    ("match", "n256 half many", dict(gram_rows=128, gram_warps=8, match_columns=64),
     lambda: calls._match("sm_90", torch.bfloat16, 196, calls.PLAIN)),
    ("match", "n256 half many", dict(num_warps=16, max_registers=128, rank_columns=64),
     lambda: calls._match("sm_90", torch.bfloat16, 196, calls.PLAIN)),
    ("groups", "small groups c128", dict(groups=32, channels=256, num_warps=8), calls._groups(torch.float32)["merge"]),
    ("row_loss", "c512", dict(members=8), calls._losses(torch.float32)["loss-cosine"]),
):
    with tables.trial("sm_90", op, bucket, fields), recording("sm_90") as launches:
        call()
    found[f"{op} {fields}"] = [resources.measure(launch, "sm_90")["registers"] for launch in launches]
print(json.dumps(found))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(0 < registers <= 255 for figures in json.loads(run.stdout).values() for registers in figures)


def test_lists_name_only_fields_that_exist() -> None:
    names = {op: {field.name for field in fields(default)} for (op, _), default in defaults().items()}
    for op, axes in SINGLES.items():
        assert axes.keys() <= names[op], op
    for op, combinations in TOGETHER.items():
        assert all(axes.keys() <= names[op] for axes in combinations), op
    assert set(listed.SCALED) | set(listed.NO_TILES) <= set().union(*names.values())
