"""The study compares what it says: same students, disjoint windows, paired seeds; statistics and page are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage")

from dtm_triton.train.config import PretrainConfig, to_json
from dtm_triton.train.engine.checkpoint import FolderError
from dtm_triton.train.engine.run_folder import differences as changed_fields
from dtm_triton.train.study import data, design, page, run
from dtm_triton.train.study.__main__ import Study, main, run_study

FEW = {"train": 6, "test": 3}


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer than the study's: 6 and 3 of every photograph."""
    folder = tmp_path_factory.mktemp("study") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOWS", FEW)
        data.write_windows(folder)
    return folder


def small(name: str, seed: int, folder: Path) -> PretrainConfig:
    """Three epochs of four steps; maps between them."""
    config = design.configure(name, seed, folder)
    attention = replace(config.attention, warmup_epochs=1, refresh_epochs=1)
    return replace(config, attention=attention, run=replace(config.run, epochs=3, batch_size=24, log_every=4))


def at_windows(windows: Path, folder: Path) -> Path:
    """A study's folder with data in it."""
    folder.mkdir()
    (folder / "data").symlink_to(windows)
    return folder


# --- data


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_no_pixel_is_in_training_and_held_out_windows(name: str) -> None:
    height, width = data.photograph(name).shape
    assert min(height, width) == data.SHORT_SIDE
    seen = {part: np.zeros((height, width), dtype=bool) for part in data.WINDOWS}
    for part, mask in seen.items():
        chosen = data.windows(name, part, (height, width))
        assert len(set(chosen)) == data.WINDOWS[part]
        for top, left, side in chosen:
            assert 0 <= top <= height - side and 0 <= left <= width - side
            mask[top : top + side, left : left + side] = True
    assert not (seen["train"] & seen["test"]).any()
    assert seen["train"].any() and seen["test"].any()


def test_windows_are_what_they_show_and_the_same_every_time(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(data, "WINDOWS", FEW)
    for part, count in data.WINDOWS.items():
        assert sorted(path.name for path in (windows / part).iterdir()) == sorted(data.PHOTOGRAPHS)
        for place in (windows / part).iterdir():
            assert len(list(place.iterdir())) == count
    coins = data.photograph("coins")
    top, left, side = data.windows("coins", "test", coins.shape)[2]
    with Image.open(windows / "test" / "coins" / "02.png") as image:
        assert image.mode == "L" and image.size == (data.WRITTEN, data.WRITTEN)
        shown = np.asarray(image).astype(float)
    cut = coins[top : top + side, left : left + side].astype(float)
    assert abs(shown.mean() - cut.mean()) < 2 and abs(shown.std() - cut.std()) < 8
    data.write_windows(tmp_path / "again")
    files = sorted(path.relative_to(windows) for path in windows.rglob("*.png"))
    assert all((tmp_path / "again" / file).read_bytes() == (windows / file).read_bytes() for file in files)


def test_windows_lie_where_they_lay_when_the_study_was_run() -> None:
    assert data.windows("coins", "test", (384, 487))[:2] == [(70, 336, 130), (105, 338, 113)]


def test_windows_half_written_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PHOTOGRAPHS", ("coins", "moon"))
    broken = tmp_path / "data.unfinished" / "train" / "none"
    broken.mkdir(parents=True)
    data.write_windows(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data" / "train").iterdir()) == ["coins", "moon"]
    (tmp_path / "data" / "train" / "coins" / "00.png").unlink()
    data.write_windows(tmp_path / "data")
    assert not (tmp_path / "data" / "train" / "coins" / "00.png").exists(), "what is there stays as it is"


# --- design


def configs(seed: int = 0) -> dict[str, PretrainConfig]:
    return {name: design.configure(name, seed, Path("s")) for name in design.ARMS}


def test_an_arm_differs_from_its_base_in_its_masks_alone() -> None:
    made = configs()
    for name, arm in design.ARMS.items():
        if arm.base:
            fields = changed_fields(to_json(made[arm.base]), to_json(made[name]))
            assert fields and all(field.split(".")[0] == "mask" for field in fields), (name, fields)
            assert design.ARMS[arm.base].images == arm.images


def test_all_arms_train_the_same_student_in_the_same_way() -> None:
    """DTM's arms for fewer epochs, and so with a shorter warm-up, than the others: they are not compared with those."""
    made = configs()
    for images in ("photographs", "digits"):
        ours = [config for name, config in made.items() if design.ARMS[name].images == images]
        first = ours[0]
        for config in ours:
            assert (config.student, config.data) == (first.student, first.data)
            if config.method == first.method:
                assert config.optimizer == first.optimizer
                assert config.run == replace(first.run, folder=config.run.folder)
        assert len({config.run.folder for config in ours}) == len(ours)
    kwargs = {json.dumps(config.student.model_kwargs) for config in made.values()}
    assert len(kwargs) == 1


def test_seeds_change_the_seed_alone() -> None:
    for name, config in configs(3).items():
        fields = changed_fields(to_json(design.configure(name, 4, Path("s"))), to_json(config))
        assert fields == ["run.seed: 4 -> 3"]


def test_maps_are_made_after_a_tenth_of_the_epochs_and_every_tenth() -> None:
    for name, config in configs().items():
        epochs = config.run.epochs
        due = [epoch for epoch in range(epochs) if config.attention.due(epoch)]
        tenth = max(epochs // 10, 1)
        assert due == list(range(tenth, epochs, tenth)), name
    steps = [epoch * design.STEPS["photographs"] for epoch in due_epochs("amt")]
    assert set(design.SHOWN_STEPS) <= set(steps)
    assert design.SHOWN_STEPS[0] == steps[0] and design.SHOWN_STEPS[-1] == steps[-1]


def due_epochs(name: str) -> list[int]:
    config = design.configure(name, 0, Path("s"))
    return [epoch for epoch in range(config.run.epochs) if config.attention.due(epoch)]


def test_shares_are_the_papers() -> None:
    from dtm_triton.partition import count_patches

    for prefix, patches in (("", 64), ("digits ", 36)):
        mae, amt = (configs()[prefix + kind].mask for kind in ("mae", "amt"))
        assert (mae.masked, mae.thrown) == (count_patches(patches, 0.75), 0)
        assert (amt.masked, amt.thrown) == (count_patches(patches, 0.45), count_patches(patches, 0.40))
        assert design.configure(f"{prefix}amt", 0, Path("s")).attention.warmup_masked == mae.masked
    dtm, both = configs()["dtm"], configs()["dtm + amt"]
    assert both.mask.masked == count_patches(64, 0.44) and both.mask.thrown == count_patches(64, 0.26)
    assert dtm.mask.masked == both.mask.masked + both.mask.thrown == both.attention.warmup_masked


def test_even_weights_choose_as_no_weights_do() -> None:
    """The control "uniform" is drawn from maps that do not matter."""
    import torch

    from dtm_triton.attention_masking import sample_partition

    mask, seeds = configs()["uniform"].mask, torch.arange(200)
    weights = torch.rand(200, 64, generator=torch.Generator().manual_seed(1)) ** 8
    common = dict(uniform=mask.uniform, order=mask.order)
    even = sample_partition(torch.ones(200, 64), seeds, (8, 8), 28, 25, **common)
    chosen = sample_partition(weights, seeds, (8, 8), 28, 25, temperature=mask.temperature, **common)
    other = sample_partition(weights, seeds, (8, 8), 28, 25, **common)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(even, chosen, strict=True))
    assert not torch.equal(other.masked, even.masked)


# --- runs


def test_a_run_is_done_once_and_gives_the_same_bits_again(windows: Path, tmp_path: Path) -> None:
    first, second = (at_windows(windows, tmp_path / name) for name in "ab")
    result = run.run_arm(first, "amt", 0, small)
    assert {"arm": "amt", "seed": 0}.items() <= result.items() and 0 < result["loss"] < 5
    assert 0 < result["knn"] < 1 and 0 < result["linear_probe"] < 1
    assert [path.name for path in sorted((first / "pictures").iterdir())] == [
        "amt_reconstructions.png",
        "amt_step_000000004.png",
        "amt_step_000000008.png",
    ]
    assert not list((first / "runs").iterdir()), "a finished run leaves its result alone"
    again = run.run_arm(second, "amt", 0, small)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert run.run_arm(first, "amt", 0, small) == result, "seconds and all: from the file"
    other = run.run_arm(first, "amt", 1, small)
    assert other["loss"] != result["loss"]
    assert len(list((first / "pictures").iterdir())) == 3, "of one seed only"


def test_a_run_that_was_stopped_goes_on(windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = run.run_arm(at_windows(windows, tmp_path / "calm"), "dtm + amt", 0, small)
    folder, draw, steps = at_windows(windows, tmp_path / "stopped"), run.draw_stage, []

    def stop(*arguments: Any) -> None:
        steps.append(arguments[3].stem[-1])
        if len(steps) == 2:
            raise KeyboardInterrupt
        draw(*arguments)

    monkeypatch.setattr(run, "draw_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run_arm(folder, "dtm + amt", 0, small)
    assert not run.result_path(folder, "dtm + amt", 0).exists()
    again = run.run_arm(folder, "dtm + amt", 0, small)
    assert steps == ["4", "8", "8"], "the steps before are not repeated"
    assert {**again, "seconds": 0} == {**calm, "seconds": 0}


def test_an_untrained_student_is_probed_as_it_is(windows: Path, tmp_path: Path) -> None:
    folder = at_windows(windows, tmp_path / "study")
    result = run.run_arm(folder, "untrained", 2, small)
    assert result["loss"] is None and 0.1 < result["linear_probe"] < 0.8
    assert not (folder / "runs").exists()


def test_results_of_another_design_are_refused(windows: Path, tmp_path: Path) -> None:
    folder = at_windows(windows, tmp_path / "study")
    run.run_arm(folder, "untrained", 0, small)
    with pytest.raises(FolderError, match=r"run.epochs: 3 -> 10"):
        run.run_arm(folder, "untrained", 0)


def test_the_command_does_what_is_left_in_processes_of_its_own(windows: Path, tmp_path: Path) -> None:
    folder = at_windows(windows, tmp_path / "study")
    kept = run.run_arm(folder, "untrained", 1)
    text = run_study(Study(folder=folder, seeds=3, arms=("untrained",), processes=2))
    runs = page.read_record(folder)["runs"]
    assert [(item["arm"], item["seed"]) for item in runs] == [("untrained", seed) for seed in range(3)]
    assert runs[1] == kept
    assert "3 seeds" in text and "untrained" in text
    assert (folder / "differences.png").stat().st_size > 1000


def test_an_unknown_arm_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"--arms must be of untrained, mae.* got 'mea'"):
        main(["--arms", "mae", "mea"])


def test_shares_of_processes_are_all_runs_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []

    def note(folder: Path, name: str, seed: int, make: Any) -> dict[str, Any]:
        done.append((name, seed))
        return {"linear_probe": 0.5, "knn": 0.25}

    monkeypatch.setattr(run, "run_arm", note)
    said: list[str] = []
    for share in range(2):
        run.run_share(tmp_path, ("mae", "amt"), range(share, 5, 2), said.append)
    assert sorted(done) == sorted((name, seed) for name in ("mae", "amt") for seed in range(5))
    assert said[0].startswith("1 of 6: mae, seed 0: linear probe 50.0 %, kNN 25.0 %; about ")
