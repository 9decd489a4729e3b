"""The loop: resuming exactly, accumulating exactly, stopping on signals and on losses that are not finite."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, final_state, stop_at, tiny_config, tiny_trainer
from torch import Tensor

from dtm_triton.train.engine.checkpoint import FolderError, load_plain, load_tensors, saved_steps
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.loop import Trainer
from dtm_triton.train.engine.saver import best_step
from dtm_triton.train.engine.stop import Stopped, StopRequest

TOTAL = 22  # steps of a tiny run


def die_at(trainer: Trainer, step: int) -> None:
    """Fail in the middle of that step, as if killed: nothing is saved."""
    forward = trainer.objective.forward

    def fail(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if trainer.step == step:
            raise KeyError("killed")
        return forward(batch)

    trainer.objective.forward = fail  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_trainer(tiny_config(folder)).fit()
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_resumes_with_the_same_bits(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """Stopped by signals and killed between checkpoints at random steps: same weights, moments and metrics."""
    stops = sorted(random.Random(seed).sample(range(1, TOTAL), 3))
    for turn, step in enumerate(stops):
        torch.manual_seed(100 + turn)  # what the process drew before must not matter
        trainer = tiny_trainer(tiny_config(tmp_path, log_every=1))
        if turn == 1:
            die_at(trainer, step)
            with pytest.raises(KeyError, match="killed"):
                trainer.fit()
        else:
            stop_at(trainer, step)
            with pytest.raises(Stopped):
                trainer.fit()
            assert load_plain(saved_steps(tmp_path / "checkpoints")[0])["step"] == step + 1
    tiny_trainer(tiny_config(tmp_path)).fit()
    assert_same_bits(final_state(tmp_path), final_state(undisturbed))
    timed = {"images_per_second"}
    rows, expected = read_metrics(tmp_path), read_metrics(undisturbed)
    assert [row["step"] for row in rows] == [*range(1, TOTAL + 1), TOTAL]
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_resumes_between_log_lines_and_with_drop_path(tmp_path: Path) -> None:
    """Sums since the last log line and the network's own random numbers continue too."""

    def trainer(folder: Path) -> Trainer:
        config = tiny_config(folder, log_every=11, evaluate_every=1)
        return tiny_trainer(replace(config, student=replace(config.student, drop_path=0.5)))

    trainer(tmp_path / "whole").fit()
    parts = trainer(tmp_path / "parts")
    stop_at(parts, 6)
    with pytest.raises(Stopped):
        parts.fit()
    trainer(tmp_path / "parts").fit()
    assert_same_bits(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    losses = [[row.get("loss") for row in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_restore_their_handlers(tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(number)
    trainer = tiny_trainer(tiny_config(tmp_path))
    stop_at(trainer, 2, number)
    with pytest.raises(Stopped) as stopped:
        trainer.fit()
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in saved_steps(tmp_path / "checkpoints")] == ["step_000000003"]


def test_a_second_signal_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    for name, accumulate in (("one", 1), ("four", 4)):
        tiny_trainer(tiny_config(tmp_path / name, accumulate=accumulate, epochs=1)).fit()
    one, four = (read_metrics(tmp_path / name) for name in ("one", "four"))
    for row, other in zip(one[:-1], four[:-1], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4)
    first, second = final_state(tmp_path / "one"), final_state(tmp_path / "four")
    for name, value in first.items():
        if name.startswith("objective.network"):
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, where: str) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, log_every=5, checkpoint_every=3))
    forward = trainer.objective.forward

    def spoil(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = forward(batch)
        if trainer.step == 6:
            if where == "loss":  # infinite, and its own gradient is finite
                results["loss"] = results["loss"] + float("inf")
            else:
                trainer.objective.network.head.weight.register_hook(lambda grad: grad * float("nan"))
        return results

    trainer.objective.forward = spoil  # type: ignore[method-assign]
    saved: list[dict[str, Any]] = []
    train_step = trainer._train_step

    def watch(loader: Any) -> None:
        train_step(loader)
        saved.append({name: value.clone() for name, value in trainer.objective.network.state_dict().items()})

    trainer._train_step = watch  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"not finite at step 6 of tiny; nothing was updated since"):
        trainer.fit()
    assert trainer.step == 9  # a checkpoint was due there, and refused
    newest = saved_steps(tmp_path / "checkpoints")[0]
    state = load_tensors(newest)
    assert load_plain(newest)["step"] == 6
    for name, value in saved[5].items():
        assert torch.equal(value, state[f"objective.network.{name}"])
        assert torch.equal(value, saved[-1][name])  # steps 6, 7 and 8 changed nothing


def test_changed_configuration_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    trainer = tiny_trainer(config)
    stop_at(trainer, 1)
    with pytest.raises(Stopped):
        trainer.fit()
    with pytest.raises(FolderError, match=r"run.seed: 0 -> 3"):
        tiny_trainer(replace(config, run=replace(config.run, seed=3)))
    assert json.loads((tmp_path / "config.json").read_text())["run"]["seed"] == 0
    with pytest.raises(FolderError, match=r"optimizer.lr: 0.01 -> 0.02"):
        tiny_trainer(replace(config, optimizer=replace(config.optimizer, lr=0.02)))
    assert tiny_trainer(replace(config, run=replace(config.run, log_every=5, checkpoint_every=9))).step == 2


def test_changed_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_trainer(tiny_config(tmp_path, epochs=1)).fit()
    monkeypatch.setattr("dtm_triton.train.data.images.Digits.fingerprint", property(lambda self: "7 digits"))
    with pytest.raises(FolderError, match="data must be the 1437 digits that the run began with, got 7 digits"):
        tiny_trainer(tiny_config(tmp_path, epochs=1))


def test_evaluates_and_keeps_the_best(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, epochs=4, evaluate_every=1))
    scores = iter([0.2, 0.9, 0.3, 0.4])
    trainer.objective.evaluate = lambda *_: {"knn": next(scores)}  # type: ignore[method-assign]
    assert trainer.fit() == {"knn": 0.4}
    best = best_step(tmp_path / "checkpoints")
    assert best is not None
    assert (load_plain(best)["step"], load_plain(best)["best"]) == (22, 0.9)
    assert [row["knn"] for row in read_metrics(tmp_path) if "knn" in row] == [0.2, 0.9, 0.3, 0.4]


def test_checkpoints_of_chosen_epochs_stay(tmp_path: Path) -> None:
    tiny_trainer(tiny_config(tmp_path, epochs=5, keep_every=2, checkpoint_every=8)).fit()
    names = [path.name.removeprefix("step_0000000") for path in saved_steps(tmp_path / "checkpoints")]
    assert names == ["55", "48", "44", "22"]
    kept = tmp_path / "checkpoints" / "step_000000022" / "kept"
    assert kept.read_text() == "end of epoch 2\n"


def test_a_damaged_checkpoint_is_replaced(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, checkpoint_every=5))
    stop_at(trainer, 9)
    with pytest.raises(Stopped):
        trainer.fit()
    damaged = saved_steps(tmp_path / "checkpoints")[0]
    assert damaged.name == "step_000000010"
    next(damaged.glob("*.safetensors")).write_bytes(b"")
    trainer = tiny_trainer(tiny_config(tmp_path, checkpoint_every=5))
    assert trainer.step == 5
    stop_at(trainer, 9)
    with pytest.raises(Stopped):
        trainer.fit()
    assert load_plain(damaged)["step"] == 10
    assert "could not be written" not in capsys.readouterr().out
    tiny_trainer(tiny_config(tmp_path)).fit()
    assert_same_bits(final_state(tmp_path), final_state(undisturbed))


def test_bfloat16_trains_and_evaluates(undisturbed: Path, tmp_path: Path) -> None:
    metrics = tiny_trainer(tiny_config(tmp_path, precision="bfloat16")).fit()
    rows, exact = read_metrics(tmp_path), read_metrics(undisturbed)
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-2) and rows[0]["loss"] != exact[0]["loss"]
    assert metrics["knn"] == pytest.approx(exact[-1]["knn"], abs=0.1)


def test_loss_falls_and_the_schedule_is_followed(undisturbed: Path) -> None:
    rows = [row for row in read_metrics(undisturbed) if "loss" in row]
    assert sum(row["loss"] for row in rows[-3:]) < 0.9 * sum(row["loss"] for row in rows[:3])
    assert rows[10]["lr"] == pytest.approx(1e-2) and rows[-1]["lr"] == pytest.approx(1e-5)
    assert rows[-1]["epoch"] == 2.0
    assert list((undisturbed / "tensorboard").iterdir())


def test_a_finished_run_is_only_evaluated(undisturbed: Path) -> None:
    trainer = tiny_trainer(tiny_config(undisturbed))
    assert trainer.step == TOTAL
    before = final_state(undisturbed)
    assert trainer.fit() == {"knn": read_metrics(undisturbed)[-1]["knn"]}
    assert_same_bits(final_state(undisturbed), before)


def test_schedules_are_drawn_by_rank_or_shared(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path))
    objective: Any = trainer.objective

    def state(rank: int, step: int = 3) -> Tensor:
        objective.seed_draws(0, step, rank)
        return objective.loss.get_extra_state()

    assert torch.equal(state(0), state(0)) and not torch.equal(state(0), state(0, 4))
    assert not torch.equal(state(0), state(1))
    objective.config = replace(objective.config, shared_schedules=True)
    assert torch.equal(state(0), state(1))


def test_no_teacher_weights_in_checkpoints(undisturbed: Path) -> None:
    names = final_state(undisturbed)
    assert not [name for name in names if "teacher" in name]
    assert "objective.network.backbone.patch_embed.mask_token" in names
    assert not [name for name in names if "_extra_state" in name]  # every step seeds its own draws
