"""The planning page: what is committed is what the script renders, and its figures are those computed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtm_triton.measure.train_record import LOADER_FORMAT, PARTS, LoaderRecord, LoaderRow, Side, TrainRecord
from dtm_triton.train import plan, recipes
from dtm_triton.train.planning import page
from dtm_triton.train.planning.facts import Facts, read_facts
from dtm_triton.train.planning.sizes import Size, count

MACHINE = {"slug": "g", "kind": "gpu", "device": "Some GPU", "date": "2026-01-02", "commit": "0" * 12}


@pytest.fixture(scope="module")
def sizes() -> dict[str, Size]:
    return {name: count(recipes.PRETRAIN[recipe]()) for name, recipe in page.RECIPES.items()}


@pytest.fixture(autouse=True)
def counted_once(sizes: dict[str, Size], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {str(recipes.PRETRAIN[page.RECIPES[name]]().student): size for name, size in sizes.items()}
    monkeypatch.setattr(page, "count", lambda config: found[str(config.student)])


def cells(text: str, heading: str, *start: str) -> list[str]:
    """The cells after those given, in the table below a heading."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in line.strip("| ").split(" | ")][len(start) :]


def gpu_record(recipe: str, rate: float, **changes: object) -> TrainRecord:
    side = Side(name="dtm", step_ms=[1e3 * 128 / rate] * 3, parts_ms={part: [1.0] * 3 for part in PARTS}, peak_bytes=1)
    record = TrainRecord(
        machine=MACHINE,
        recipe=recipe,
        student="s",
        teacher="t",
        batch=128,
        processes=1,
        steps=1,
        precision="bfloat16",
        workers=1,
        source="x",
        student_flops=1,
        teacher_flops=1,
        matrix_tflop_s=1.0,
        sides=[side],
    )
    return replace(record, **changes)


def test_the_committed_page_is_what_the_script_renders() -> None:
    """After a change of recipes, records or formulas: `python train/plan.py`."""
    assert plan.PAGE.read_text() == page.render(plan.DATA)


def test_operations_are_those_counted_by_hand(sizes: dict[str, Size]) -> None:
    """ViT-B: 196 patches of 768 numbers; 12 blocks of 197 tokens, each 12 d^2 products and 2 N d for attention."""
    embedding = 2 * 196 * 768 * 768
    blocks = 2 * 12 * (197 * 12 * 768**2 + 2 * 197**2 * 768)
    head = 2 * 196 * 768 * 512
    assert sizes["ViT-B"].student_flops == 2 * embedding + 3 * (blocks + head) == 105_609_572_352
    assert sizes["ViT-B"].teacher_flops == embedding + blocks + head
    assert sizes["ViT-S"].student_parameters == 21_796_520 and 303e6 < sizes["ViT-L"].student_parameters < 304e6


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    """On assumptions alone, for ViT-B: 86.06 million parameters, 2,800 images/s a GPU."""
    text = page.render(tmp_path)
    # 64 x 2800 = 179,200 images/s; / 600 = 298.7 cores, / 1200 = 149.3; a machine of 8 takes 37.3 and 18.7
    assert cells(text, "Images a second", "ViT-B", "64") == ["179,200", "299", "150", "38 / 19"]
    # 2 x 7/8 x 4 x 86.06e6 = 0.602 GB at 300 GB/s: 2.01 ms; with 63/64 0.678 GB at 40 GB/s: 16.9; 128 / 2800 = 45.7 ms
    assert cells(text, "Traffic", "ViT-B", "8") == ["0.602", "0.602", "2.01", "2.01", "45.7"]
    assert cells(text, "Traffic", "ViT-B", "64") == ["0.678", "0.678", "16.9", "16.9", "45.7"]
    # 4 bytes: weights and gradients 0.344 GB each, moments twice that, the teacher's 86.19e6 x 4 = 0.345
    assert cells(text, "Memory", "ViT-B", "DDP, any number") == ["0.344", "0.344", "0.688", "0.345", "1.72", "0.344"]
    assert cells(text, "Memory", "ViT-B", "FSDP, 8")[:4] == ["0.0430", "0.0430", "0.0861", "0.345"]
    # 12 bytes: 1.033 GB; at 20 GB/s 52 ms, at 2 GB/s 0.52 s; every 500 steps of 45.7 ms; 375,300 / 500 = 750 times
    assert cells(text, "Checkpoints", "ViT-B", "8") == ["1.03", "0.0516", "0.516", "22.9", "750", "0.226 %"]
    # floor(1,281,167 / 1024) = 1251; x 300 = 375,300 steps; x 45.71 ms = 17,157 s = 4.77 h; with 2.01 ms 4.975 h
    assert cells(text, "300 epochs at", "ViT-B", "8") == ["128", "375300", "4.77", "4.98"]
    # with 16 images 5.71 ms, less than the traffic's 16.94: 1.77 h hidden, 2.36 h one after the other
    assert cells(text, "300 epochs at", "ViT-B", "64") == ["16", "375300", "1.77", "2.36"]
    # batch 8192: 156 steps an epoch, lr 1.5e-3 x sqrt(8192 / 2048), warm-up 10 epochs; 46,800 x 45.71 ms = 0.594 h
    assert cells(text, "300 epochs with", "ViT-B", "64")[:5] == ["8192", "3.00e-03", "46800", "1560", "0.594"]
    # ViT-L by operations: 2800 x (105.61 + 35.28) / (369.63 + 35.28) = 974
    assert cells(text, "Students", "ViT-L")[-2:] == ["974", "ViT-B's, by operations"]


def test_assumptions_say_so(tmp_path: Path) -> None:
    section = page.render(tmp_path).split("## What it stands on")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 14 and all(len(row) == 3 for row in rows)
    sources = {row[2].split(":")[0] for row in rows}
    assert sources == {"assumed", "counted", "the recipes", "ImageNet-1K's training set"}


def test_what_is_measured_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    gpu_record(page.RECIPES["ViT-B"], 2000.0).write(tmp_path)
    gpu_record(page.RECIPES["ViT-L"], 500.0).write(tmp_path)
    gpu_record(page.RECIPES["ViT-S"], 9000.0, processes=2).write(tmp_path)
    rows = [LoaderRow(chain="folder", images_per_second_per_core=800.0, iqr=1.0, runs=3)]
    loader = LoaderRecord(machine=MACHINE, source="x", rows=rows)
    (tmp_path / "loader.json").write_text(json.dumps({"format": LOADER_FORMAT, **asdict(loader)}))
    text = page.render(tmp_path)
    assert "| 2,000 | measured on Some GPU, 128 images a step, 2026-01-02 |" in text
    assert cells(text, "Students", "ViT-L")[-2:] == ["500", "measured on Some GPU, 128 images a step, 2026-01-02"]
    assert cells(text, "Students", "ViT-S")[-1] == "ViT-B's, by operations", "two processes are not one GPU"
    assert cells(text, "Images a second", "ViT-B", "8") == ["16,000", "20", "14", "20 / 14"]
    facts = read_facts(tmp_path, page.RECIPES["ViT-B"])
    assert facts.folder_rate.measured and not facts.shards_rate.measured


def test_a_cpu_record_plans_no_gpu(tmp_path: Path) -> None:
    gpu_record(page.RECIPES["ViT-B"], 2.0, machine=MACHINE | {"kind": "cpu"}).write(tmp_path)
    assert read_facts(tmp_path, page.RECIPES["ViT-B"]) == Facts()


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    plan.main(["--data", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == page.render(tmp_path)
    with pytest.raises(SystemExit, match="no folder .*nowhere"):
        plan.main(["--out", str(tmp_path / "nowhere" / "page.md")])


@pytest.mark.parametrize(
    ("script", "command"), [("bench", "dtm-train-bench"), ("step_bench", "dtm-step-bench"), ("plan", "dtm-plan")]
)
def test_the_scripts_open_from_a_checkout(script: str, command: str, tmp_path: Path) -> None:
    """From any folder; the folder train/ is not searched for modules, as it holds names such as `data`."""
    path = plan.ROOT / "train" / f"{script}.py"
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"usage: {command}" in done.stdout
