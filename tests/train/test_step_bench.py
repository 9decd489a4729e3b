"""dtm-step-bench from end to end, on tiny recipes on the CPU; what the page says of its records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shrunk import shrink, shrunk_trainer, write_images

from dtm_triton.measure.render_steps import readable_steps, step_parts
from dtm_triton.measure.step_record import StepRecord, StepRow, read_steps
from dtm_triton.train import bench, plan, recipes, step_bench
from dtm_triton.train.benchmark.inputs import past_warm_up
from dtm_triton.train.benchmark.turns import Turns
from dtm_triton.train.build import build_objective
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.planning.budget import token_budget

NAMES = ("mae_vit_base", "amt_mae_vit_base", "dtm_amt_vit_base")
MACHINE = {"slug": "some-gpu", "kind": "gpu", "device": "Some GPU", "cpu": "Some CPU, 16 threads", "torch": "2.11.0"}
MACHINE |= {"date": "2026-01-02", "commit": "0123456789ab", "sources": "ba9876543210"}


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, PretrainConfig]:
    """Three recipes under names of their own."""
    images = write_images(tmp_path_factory.mktemp("images"))
    small = {f"tiny_{name}": shrink(recipes.PRETRAIN[name](), images, images / "run") for name in NAMES}
    for name, config in small.items():
        monkeypatch.setitem(recipes.PRETRAIN, name, lambda config=config: config)
    return small


def run(folder: Path, *words: str) -> StepRecord:
    names = [f"tiny_{name}" for name in NAMES]
    options = ["--device", "cpu", "--batch", "4", "--repetitions", "3", "--steps", "1", "--out", str(folder)]
    step_bench.main(["--recipes", *names, *options, *words])
    (record,) = read_steps(folder)
    return record


def test_it_measures_writes_and_says(
    tiny: dict[str, PretrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path)
    assert (record.batch, record.steps, record.precision, record.options) == (4, 1, "float32", [])
    assert [row.recipe for row in record.rows] == list(tiny)
    for row, config in zip(record.rows, tiny.values(), strict=True):
        found = token_budget(config)
        assert (row.encoder_tokens, row.decoder_tokens, row.flops) == (
            found.encoder_tokens,
            found.decoder_tokens,
            found.flops,
        )
        assert len(row.step_ms) == 3 and min(row.step_ms) > 0
    first, second, _ = record.rows
    assert (first.encoder_tokens, first.decoder_tokens) == (1 + 6, 1 + 24)
    assert (second.encoder_tokens, second.decoder_tokens) == (1 + 5, 1 + 15)
    printed = capsys.readouterr().out
    assert "3/3 tiny_dtm_amt_vit_base" in printed and "times tiny_mae_vit_base" in printed
    assert str(tmp_path / f"steps-{record.machine['slug']}-tiny-mae-vit-base.json") in printed
    turns = [line.split("]")[1].split(":")[0].strip() for line in printed.splitlines() if " ms a step" in line]
    assert turns == [f"{turn}/3 {name}" for turn in (1, 2, 3) for name in tiny], "they take turns"


def test_masks_have_maps_and_follow_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that is timed throws patches away: none is one of the warm-up."""
    seen: dict[str, list[int]] = {}
    ready = step_bench._trainer

    def watched(config: PretrainConfig, processes: Any) -> Trainer:
        trainer = ready(config, processes)
        name = f"{config.method} {config.mask.thrown}"
        look = trainer.objective.look  # type: ignore[operator]

        def noted(batch: Any, images: Any) -> Any:
            targets, found = look(batch, images)
            assert ("map" in batch) == (config.mask.kind == "attention" and config.attention.maps == "stored")
            seen.setdefault(name, []).append(found.thrown.shape[1])
            return targets, found

        trainer.objective.look = noted  # type: ignore[assignment]
        return trainer

    monkeypatch.setattr(step_bench, "_trainer", watched)
    run(tmp_path)
    steps = step_bench.WARM_UP + 3
    assert seen == {"mae 0": [0] * steps, "mae 9": [9] * steps, "masked 6": [6] * steps}


def test_maps_are_random_and_of_all_images(tiny: dict[str, PretrainConfig], tmp_path: Path) -> None:
    config = tiny["tiny_amt_mae_vit_base"]
    trainer = shrunk_trainer(replace(config, run=replace(config.run, folder=tmp_path)))
    past_warm_up(trainer)
    assert trainer.maps is not None and trainer.maps.store is not None
    trainer.maps.store.check(16, (4, 6), "uint8")
    assert np.unique(trainer.maps.store.maps).size > 100


class Stub:
    """Stands for a Trainer: a step takes as long as it is told."""

    def __init__(self, seconds: float, wait: Callable[[float], None]) -> None:
        self.device, self.seconds, self.wait = torch.device("cpu"), seconds, wait
        self.batches = [{"number": torch.tensor([number]), "skipped": torch.tensor([-1])} for number in range(3)]
        self.taken: list[int] = []

    def _train_step(self, incoming: Any) -> None:
        batch = next(incoming)
        batch.pop("skipped")
        self.taken.append(int(batch["number"]))
        self.wait(self.seconds)


def test_times_are_those_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("dtm_triton.train.benchmark.turns.time.perf_counter", lambda: clock[0])
    slow, fast = Stub(0.5, wait), Stub(0.25, wait)
    said: list[str] = []
    times = Turns({"slow": slow, "fast": fast}).run(3, steps=4, warm_up=2, say=said.append)  # type: ignore[dict-item]
    assert times == {"slow": [500.0] * 3, "fast": [250.0] * 3} and len(said) == 6
    assert slow.taken == fast.taken == [0, 1] * 7, "batches are used again, each as it was"


def test_the_page_shows_ratios_turn_by_turn(tmp_path: Path) -> None:
    rows = [
        StepRow(
            recipe="mae", step_ms=[100.0, 200.0, 400.0], encoder_tokens=50, decoder_tokens=197, flops=20_000_000_000
        ),
        StepRow(recipe="amt", step_ms=[50.0, 120.0, 200.0], encoder_tokens=31, decoder_tokens=0, flops=12_000_000_000),
    ]
    record = StepRecord(
        machine=MACHINE, batch=8, steps=2, precision="float32", options=["compile"], source="generated", rows=rows
    )
    assert record.write(tmp_path).name == "steps-some-gpu-mae.json" and read_steps(tmp_path) == [record]
    title, setting, table = step_parts(tmp_path)
    assert title == "## Training steps beside each other on Some GPU"
    assert "8 images a step, float32, compile; generated." in setting and "over 3 turns of 2 steps" in setting
    assert table.splitlines()[2:] == [
        "| mae | 200 (300) | 1.00 (0) | 50 / 197 | 20.0 | 1.00 |",
        "| amt | 120 (150) | 0.500 (0.100) | 31 | 12.0 | 0.600 |",
    ]
    assert "| " not in readable_steps(record) and step_parts(tmp_path / "none") == []


def test_mistakes_end_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--recipes must be some of .*amt_mae_vit_base.*; got 'banana'"):
        step_bench.main(["--recipes", "mae_vit_base", "banana"])
    with pytest.raises(SystemExit, match="--recipes must be different ones, got 'demo' twice"):
        step_bench.main(["--recipes", "demo", "demo"])
    with pytest.raises(SystemExit):
        step_bench.main([])


def test_dtm_train_bench_counts_what_is_left_after_the_warm_up(tiny: dict[str, PretrainConfig], tmp_path: Path) -> None:
    counted = {}
    for name, config in tiny.items():
        objective: Any = build_objective(replace(config, run=replace(config.run, folder=tmp_path / name)), Processes())
        student, _ = bench.count_operations(objective, config, Processes())
        counted[name], forward = student, token_budget(config).flops
        assert 2.5 * forward < student < 3.2 * forward, "backward twice the forward, but for the image's gradient"
    assert counted["tiny_amt_mae_vit_base"] < 0.8 * counted["tiny_mae_vit_base"]


def test_records_of_the_checkout_are_read() -> None:
    for record in read_steps(plan.DATA):
        assert len(record.rows) > 1 and all(row.flops > 0 for row in record.rows)
