"""Checkpoints survive a kill at any moment, damage is noticed, and nothing but tensors and plain values is read."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dtm_triton.train.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    saved_steps,
    write_atomically,
)


def state(step: int) -> dict[str, object]:
    return {"step": step, "weights": {"w": torch.full((1000,), float(step))}}


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, state(step), best=step == 2)
    assert [path.name for path in saved_steps(tmp_path)] == ["step_000000005.pt", "step_000000004.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    newest = load_newest(tmp_path, print)
    assert newest is not None and newest["step"] == 5 and torch.equal(newest["weights"]["w"], torch.full((1000,), 5.0))
    assert load_newest(tmp_path / "nothing here", print) is None


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr("os.link", refuse)
    save_checkpoint(tmp_path, 4, state(4), best=True)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == load_checkpoint(tmp_path / "step_000000004.pt")["step"] == 4


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, state(step))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-50], "emptied": b"", "flipped": bytes(data)}[damage])
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None and found["step"] == 1
    assert len(messages) == 1 and "step_000000002.pt" in messages[0]
    (tmp_path / "step_000000001.pt").write_bytes(b"PK nonsense")
    with pytest.raises(CheckpointError, match="can be read; remove them to start over"):
        load_newest(tmp_path, messages.append)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(1)}, tmp_path / "step_000000001.pt")
    with pytest.raises(CheckpointError, match="not one of a training run"):
        load_checkpoint(tmp_path / "step_000000001.pt")

    torch.save({"step": 1, "code": pytest.raises}, tmp_path / "step_000000002.pt")  # code would run if it were read
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "step_000000002.pt")
    (tmp_path / "step_000000003.pt").write_bytes(pickle.dumps({"step": 3}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "step_000000003.pt")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        file.write(b"half of the new")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


SAVER = """
import sys
from pathlib import Path
import torch
from dtm_triton.train.engine.checkpoint import load_newest, save_checkpoint
found = load_newest(Path(sys.argv[1]), print)
step = found["step"] if found else 0
print("ready", flush=True)
while True:
    step += 1
    state = {"step": step, "w": torch.full((200_000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), step, state, best=step % 3 == 0)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 inside the saving: whatever carries a final name is whole."""
    draw, last = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        messages: list[str] = []
        found = load_newest(tmp_path, messages.append)
        assert found is not None and messages == []
        assert found["step"] > last and torch.equal(found["w"], torch.full((200_000,), float(found["step"])))
        best = load_checkpoint(tmp_path / "best.pt")["step"]
        assert best % 3 == 0 and found["step"] - 2 <= best <= found["step"] + 1  # never an old best
        last = found["step"]
