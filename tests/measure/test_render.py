"""The page is what its data render to, and the data say who measured what."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dtm_triton.measure import render
from dtm_triton.measure.cases import Case, gpu_cases
from dtm_triton.measure.ceilings import Ceilings
from dtm_triton.measure.plot import draw
from dtm_triton.measure.record import Record, Row, read, read_all
from dtm_triton.measure.timing import Timing

CASE = Case(op="merge", batch=128, tokens=196, channels=768, schedules=((14,) * 7,))
MACHINE = {
    "slug": "some-gpu",
    "kind": "gpu",
    "device": "Some GPU",
    "cpu": "Some CPU, 4 threads",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-01-02",
    "commit": "0123456789ab-dirty",
    "sources": "ba9876543210",
    "cuda": "13.0",
    "driver": "580.1",
}
RECORD = Record(
    machine=MACHINE,
    ceilings=Ceilings(copy_gb_s=4000.0, matrix_tflop_s={"bfloat16": 800.0}),
    seconds=0.5,
    rows=[
        Row.of(CASE, "triton", median_ms=0.02, iqr_ms=0.001, calls=9, peak_bytes=3 * 2**20),
        Row.of(CASE, "reference", median_ms=0.5, iqr_ms=0.01, calls=9, peak_bytes=5 * 2**20),
        Row.of(CASE, "compiled", reason="compiling took more than 25 s"),
    ],
    host={"match_tokens": Timing(median_ms=0.05, iqr_ms=0.002, calls=100)},
    replay={"dtm_loss": Timing(median_ms=0.1, iqr_ms=0.002, calls=100)},
)


@pytest.fixture
def page(tmp_path: Path) -> str:
    RECORD.write(tmp_path)
    return render.render(render.folder_places(tmp_path))


def test_the_committed_page_is_what_the_data_render_to() -> None:
    """After a change of data, method, resources or cases: `python kernels/bench.py --render`."""
    places = render.checkout_places()
    assert places.page.read_text() == render.render(places)


def test_the_committed_data_are_complete() -> None:
    for record in read_all(render.checkout_places().data):
        assert (render.checkout_places().pictures / f"{record.machine['slug']}.png").exists()
        assert "dirty" not in record.machine["commit"], "measure a commit that others can check out"


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    assert read(RECORD.write(tmp_path)) == RECORD


def test_a_row_shows_what_follows_from_its_time(page: str) -> None:
    """58 MB in 20 us, against a floor of 14 us, 25 times as fast as the reference."""
    row = Row.of(CASE, "triton")
    gigabytes, floor_us = row.bytes / 0.02e6, row.bytes / 4e6
    cells = next(line for line in page.splitlines() if line.startswith(f"| {CASE.name} | triton |")).split(" | ")
    assert cells[2:4] == ["20.0 (1.00)", "25.0 x"]
    assert float(cells[4]) == pytest.approx(gigabytes, rel=0.01) and float(cells[6]) == pytest.approx(
        floor_us, rel=0.01
    )
    assert float(cells[7]) == pytest.approx(20 / floor_us, rel=0.01) and cells[8] == "3.00 |"


def test_versions_date_and_commit_are_shown(page: str) -> None:
    for name in ("device", "python", "torch", "triton", "date", "commit", "cuda", "driver"):
        assert MACHINE[name] in page, name
    unknown = replace(RECORD, machine=MACHINE | {"commit": "unknown"})
    assert "sources ba9876543210" in "\n".join(render._machine(unknown, render.folder_places(Path("nowhere"))))


def test_what_was_not_measured_says_so(page: str, tmp_path: Path) -> None:
    assert f"| {CASE.name} | reference, torch.compile | not measured: compiling took more than 25 s |" in page
    assert "GPU: not measured" not in page
    (tmp_path / "some-gpu.json").unlink()
    without = render.render(render.folder_places(tmp_path))
    assert "GPU: not measured" in without and "**estimates**" in without and "**assumed**" in without
    for case in gpu_cases():
        assert re.search(rf"\| {re.escape(case.name)} \|.*\| not measured \|", without)


def test_calls_and_replays_are_shown(page: str) -> None:
    assert "| match_tokens | 50.0 (2.00) |" in page and "| dtm_loss | 100 (2.00) |" in page
    none = replace(RECORD, replay={})
    assert "graph: not measured" in "\n".join(render._machine(none, render.folder_places(Path("nowhere"))))


def test_tables_are_tables(page: str) -> None:
    """Every row of a table has as many cells as its header."""
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_picture_is_drawn_and_linked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    RECORD.write(tmp_path)
    assert draw(RECORD, tmp_path / "some-gpu.png")
    assert (tmp_path / "some-gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "(some-gpu.png)" in render.render(render.folder_places(tmp_path))


def test_the_method_has_its_parts() -> None:
    for heading in (
        "## Method",
        "### How it measures",
        "### What the figures do not show",
        "### What was tried and lost",
    ):
        assert heading in render.METHOD.read_text()
