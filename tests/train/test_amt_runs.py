"""Whole runs with attention maps: made on schedule, kept with checkpoints, continued in the middle, in any process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attending import STAGES, attending, train_attending
from processes import run_together
from shrunk import shrunk_trainer
from tiny import assert_same_bits, final_state, stop_at

from dtm_triton.train.engine import saver
from dtm_triton.train.engine.checkpoint import CheckpointError, FolderError, load_plain, saved_steps
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.stop import Stopped


def maps_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted(folder.glob("maps/*.npy"))}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    train_attending(Processes(), folder, "mae")
    return folder


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "mae"])
def test_every_kind_trains_and_goes_on_to_the_same_bits(stage: str, tmp_path: Path) -> None:
    train_attending(Processes(), tmp_path / "whole", stage)
    train_attending(Processes(), tmp_path / "parts", stage, stop=15)  # four steps after the first maps
    train_attending(Processes(), tmp_path / "parts", stage)
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert len(losses) == 33 and np.isfinite(losses).all()


def test_maps_are_made_when_they_are_due_and_lie_beside_weights(calm: Path) -> None:
    maps = maps_of(calm)
    assert list(maps) == ["step_000000022.npy"], "those of the first refresh are gone"
    assert maps["step_000000022.npy"].shape == (1437, 6, 6) and maps["step_000000022.npy"].dtype == np.uint8
    for path in saved_steps(calm / "checkpoints"):
        assert load_plain(path)["step"] > 22
        kept, used = path / "maps.npy", calm / "maps" / "step_000000022.npy"
        assert kept.read_bytes() == used.read_bytes() and not kept.samefile(used), "damage in one harms no other"


def test_batches_come_with_the_maps_of_their_images(tmp_path: Path) -> None:
    trainer = shrunk_trainer(attending(tmp_path, epochs=2))
    objective: Any = trainer.objective
    forward, seen = objective.masks.forward, []

    def noted(batch: Any, attended: Any = None) -> Any:
        stored = trainer.maps.store if trainer.maps is not None else None
        seen.append("map" in batch)
        if "map" in batch:
            assert stored is not None and (batch["map"] == stored.rows(batch["number"])).all()
        return forward(batch, attended)

    objective.masks.forward = noted
    trainer.fit()
    assert seen == [False] * 11 + [True] * 11


def test_a_checkpoint_brings_its_maps(calm: Path, tmp_path: Path) -> None:
    """Also where the run's own folder of maps is lost, and with the older maps when it is older."""
    train_attending(Processes(), tmp_path, "mae", stop=15)
    for path in tmp_path.glob("maps/*"):
        path.unlink()
    train_attending(Processes(), tmp_path, "mae")
    assert_same_bits(final_state(tmp_path), final_state(calm))


@pytest.mark.parametrize("when", [11, 22])
def test_killed_in_the_middle_of_the_maps_they_are_continued(when: int, calm: Path, tmp_path: Path) -> None:
    """What was made is not made again, and the bits are the same."""
    calls: list[int] = []  # 12 batches show all images

    def start(broken: bool) -> None:
        trainer = shrunk_trainer(attending(tmp_path))
        attend = trainer.objective.attend

        def counted(images: Any) -> Any:
            if trainer.step == when:
                calls.append(len(images))
                if broken and len(calls) == 8:
                    raise KeyboardInterrupt
            return attend(images)

        trainer.objective.attend = counted  # type: ignore[method-assign]
        trainer.fit()

    with pytest.raises(KeyboardInterrupt):
        start(broken=True)
    assert load_plain(saved_steps(tmp_path / "checkpoints")[0])["step"] == when
    assert calls == [128] * 8
    start(broken=False)
    assert calls == [128] * 13, "only the interrupted batch is shown again"
    assert_same_bits(final_state(tmp_path), final_state(calm))
    assert sorted(path.name for path in tmp_path.glob("maps/*")) == ["step_000000022.crc", "step_000000022.npy"]


def test_a_signal_during_the_maps_is_heard(calm: Path, tmp_path: Path) -> None:
    trainer = shrunk_trainer(attending(tmp_path))
    attend, calls = trainer.objective.attend, []

    def signalled(images: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return attend(images)

    trainer.objective.attend = signalled  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.step == 11 and len(calls) == 5
    shrunk_trainer(attending(tmp_path)).fit()
    assert_same_bits(final_state(tmp_path), final_state(calm))


def test_stopped_between_maps_the_older_ones_are_used(calm: Path, tmp_path: Path) -> None:
    """A step after a checkpoint that is older than the newest maps looks at the older maps."""
    trainer = shrunk_trainer(attending(tmp_path, checkpoint_every=5))
    stop_at(trainer, 24)
    with pytest.raises(Stopped):
        trainer.fit()
    folder = tmp_path / "checkpoints"
    assert [path.name for path in saved_steps(folder)] == ["step_000000025", "step_000000022"]
    for path in (folder / "step_000000025").iterdir():
        path.unlink()  # damaged
    shrunk_trainer(attending(tmp_path, checkpoint_every=5)).fit()
    assert_same_bits(final_state(tmp_path), final_state(calm))


def test_spoilt_maps_spoil_a_checkpoint(tmp_path: Path) -> None:
    train_attending(Processes(), tmp_path, "mae", stop=15)
    newest = saved_steps(tmp_path / "checkpoints")[0]
    data = bytearray((newest / "maps.npy").read_bytes())
    data[-1] ^= 1
    (newest / "maps.npy").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged in 'maps\.npy'"):
        load_plain(newest)


def test_a_stop_during_maps_is_not_called_saved_when_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before the maps could not be written: the last word is its trouble."""
    trainer = shrunk_trainer(attending(tmp_path, checkpoint_every=100))
    attend = trainer.objective.attend

    def signalled(images: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return attend(images)

    def refuse(*_: Any) -> None:
        raise OSError("No space left on device")

    trainer.objective.attend = signalled  # type: ignore[method-assign]
    monkeypatch.setattr(saver, "seal", refuse)
    with pytest.raises(FolderError, match=r"stopped at step 11; its checkpoint .* No space left on device"):
        trainer.fit()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one(strategy: str, calm: Path, tmp_path: Path) -> None:
    run_together(2, train_attending, tmp_path, "mae", None, {"strategy": strategy})
    ours, theirs = maps_of(tmp_path), maps_of(calm)
    assert ours.keys() == theirs.keys()
    for name, maps in ours.items():
        assert np.abs(maps.astype(int) - theirs[name]).max() <= 3, "weights differ by rounding"
    rows = [[row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (tmp_path, calm)]
    assert rows[0] == pytest.approx(rows[1], rel=5e-3)
    assert json.loads((saved_steps(tmp_path / "checkpoints")[0] / "state.json").read_text())["processes"] == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_to_the_same_bits(strategy: str, tmp_path: Path) -> None:
    changes = {"strategy": strategy}
    run_together(2, train_attending, tmp_path / "whole", "dtm", None, changes)
    run_together(2, train_attending, tmp_path / "parts", "dtm", 15, changes)
    run_together(2, train_attending, tmp_path / "parts", "dtm", None, changes)
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
