"""What the page says of training and loading follows from the records."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtm_triton.measure import render
from dtm_triton.measure.render_training import readable, training_parts
from dtm_triton.measure.train_record import (
    LOADER_FORMAT,
    PARTS,
    Figure,
    LoaderRecord,
    LoaderRow,
    Side,
    TrainRecord,
    read_loader,
    read_train,
)

MACHINE = {
    "slug": "nvidia-h200",
    "kind": "gpu",
    "device": "NVIDIA H200",
    "cpu": "Some CPU, 16 threads",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "date": "2026-01-02",
    "commit": "0123456789ab",
    "sources": "ba9876543210",
}


def side(name: str, step: float, objective: float) -> Side:
    """Three repetitions around `step` milliseconds; the teacher takes a quarter, the objective what it is given."""
    times = [step - 1, step, step + 2]
    parts = {part: [0.0] * 3 for part in PARTS}
    parts |= {"teacher": [t / 4 for t in times], "objective": [objective] * 3}
    parts["student"] = [t - t / 4 - objective for t in times]
    return Side(name=name, step_ms=times, parts_ms=parts, peak_bytes=3_000_000)


RECORD = TrainRecord(
    machine=MACHINE,
    recipe="dtm_vit_base_patch16_in1k",
    student="beit_base_patch16_224",
    teacher="some teacher",
    batch=256,
    processes=1,
    steps=5,
    precision="bfloat16",
    workers=15,
    options=["compile"],
    source="generated images",
    student_flops=105_000_000_000,
    teacher_flops=35_000_000_000,
    matrix_tflop_s=700.0,
    sides=[side("dtm", 100.0, 2.0), side("token-wise", 98.5, 0.5), side("released", 120.0, 22.0)],
)
LOADER = LoaderRecord(
    machine=MACHINE,
    source="some photographs",
    rows=[
        LoaderRow(chain="folder", images_per_second_per_core=600.0, iqr=5.0, runs=7),
        LoaderRow(chain="released DTM", images_per_second_per_core=150.0, iqr=2.0, runs=7),
    ],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RECORD.write(tmp_path)
    (tmp_path / "loader-x.json").write_text(json.dumps({"format": LOADER_FORMAT, **asdict(LOADER)}))
    (tmp_path / "other.json").write_text('["no record"]')
    return tmp_path


def cells(page: str, start: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("| ").split(" | ")][1:]


def test_records_survive_their_files(folder: Path) -> None:
    assert read_train(folder) == [RECORD] and read_loader(folder) == [LOADER]
    assert (folder / "train-nvidia-h200-dtm-vit-base-patch16-in1k.json").exists()


def test_speed_memory_and_utilisation_follow_from_the_steps(folder: Path) -> None:
    """256 images in 100 ms; 140 GFLOP an image, against 700 TFLOP/s: 51.2 %."""
    page = "\n".join(training_parts(folder))
    found = cells(page, "DTM")
    assert found[0].startswith("2560 (") and found[1] == "100 (3.00)"
    assert found[2] == "1.50 (0)", "paired, so the spread of both is not in it"
    assert found[3:] == ["3.00", "51.2 %"]
    assert cells(page, "token-wise")[2] == "" and cells(page, "DTM, released operations")[2] == "21.5 (0)"
    assert "358 TFLOP/s in all" in page and "reaches 700 on each device; of the 989 on its data sheet 36.2 %" in page


def test_shares_are_of_the_sum_of_the_parts(folder: Path) -> None:
    page = "\n".join(training_parts(folder))
    assert cells(page, "DTM, ms")[PARTS.index("objective")] == "2.00 (0)"
    assert cells(page, "DTM, %")[PARTS.index("teacher")] == "25.0 (0)"
    assert cells(page, "DTM, %")[PARTS.index("objective")].startswith("2.00 (")
    assert re.search(r"is 2\.00 \(.*\) % of a step, 2\.67 \(.*\) % of one without its teacher", page)


def test_processes_share_the_work() -> None:
    two = replace(RECORD, processes=2)
    assert two.utilisation(two.sides[0]) == pytest.approx(RECORD.utilisation(RECORD.sides[0]) / 2)
    assert "2 processes, 256 images" in readable(two)


def test_goals_stand_beside_what_they_were_set_for(folder: Path, tmp_path: Path) -> None:
    assert "2800 images/s, 40 % of the matrix rate" in readable(RECORD)
    other = replace(RECORD, machine=MACHINE | {"device": "Some GPU"})
    assert "Goal" not in readable(other) and "data sheet" not in readable(other)
    cpu = replace(RECORD, machine=MACHINE | {"kind": "cpu"}, recipe="dtm_vit_small_patch16_in1k", batch=8)
    assert "Goal: at most 3 % of a step" in readable(cpu) and "Goal" not in readable(replace(cpu, batch=16))
    assert "not measured" not in "\n".join(training_parts(folder))
    assert "## Training on GPUs: not measured" in training_parts(tmp_path / "empty")


def test_loaders_are_compared_with_the_released_transforms(folder: Path) -> None:
    page = "\n".join(training_parts(folder))
    assert cells(page, "folder") == ["600 (5.00)", "7", "4.00 x"] and "some photographs" in page


def test_the_page_holds_both(folder: Path) -> None:
    page = render.render(render.folder_places(folder))
    assert f"## Training {RECORD.recipe} on NVIDIA H200" in page and "## Loading images on NVIDIA H200" in page
    for fact in ("device", "torch", "date", "commit"):
        assert page.count(MACHINE[fact]) >= 2, fact
    unknown = replace(RECORD, machine=MACHINE | {"commit": "unknown"})
    unknown.write(folder)
    assert "commit unknown (sources ba9876543210)" in render.render(render.folder_places(folder))
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_committed_records_are_of_commits_that_others_can_check_out() -> None:
    data = render.checkout_places().data
    for record in [*read_train(data), *read_loader(data)]:
        assert re.fullmatch("[0-9a-f]{12}|unknown", record.machine["commit"]), "measure what others can check out"


def test_figures() -> None:
    assert Figure.of([4.0]) == Figure(4.0, 0.0)
    assert Figure.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Figure(3.0, 3.0)
