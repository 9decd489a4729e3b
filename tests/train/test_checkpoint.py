"""Checkpoints on disk: whole or not there, checked when read, never code."""

from __future__ import annotations

import json
import os
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
    load_into,
    load_newest,
    load_plain,
    load_tensors,
    saved_steps,
    write_atomically,
)
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.saver import Saver


def save(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps, newest first; a tensor of each is filled with the step."""
    saver = Saver(folder, Processes())
    for step in steps:
        saver.save(step, {"w": torch.full((1000,), float(step)), "n": torch.tensor(step)}, {"step": step})
    assert saver.finish() is None
    return saved_steps(folder)


def test_reads_what_was_written(tmp_path: Path) -> None:
    save(tmp_path, 4, 5)
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None and found[1]["step"] == 5 and messages == []
    tensors = load_tensors(found[0])
    assert torch.equal(tensors["w"], torch.full((1000,), 5.0)) and tensors["n"].dtype == torch.int64
    into = {"w": torch.zeros(1000), "n": torch.tensor(0)}
    load_into(found[0], into)
    assert torch.equal(into["w"], tensors["w"]) and into["n"] == 5
    assert load_newest(tmp_path / "nothing here", print) is None


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "missing", "state"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    newest, older = save(tmp_path, 1, 2)
    file = newest / "state.json" if damage == "state" else next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        spoilt = {"truncated": data[:-50], "emptied": b"", "flipped": bytes(data), "state": data[: len(data) // 2]}
        file.write_bytes(spoilt[damage])
    messages: list[str] = []
    found = load_newest(tmp_path, messages.append)
    assert found is not None and found[0] == older
    assert len(messages) == 1 and newest.name in messages[0]
    (older / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="can be read; remove them to start over"):
        load_newest(tmp_path, messages.append)


def test_foreign_files_are_refused_and_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Foreign:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(ran),)

    path = save(tmp_path / "run", 1)[0]
    with open(path / ".metadata", "wb") as file:  # where torch.distributed.checkpoint itself would look for a pickle
        pickle.dump(Foreign(), file)
    assert load_tensors(path)["n"] == 1
    weights = next(path.glob("*.safetensors"))
    weights.write_bytes(pickle.dumps(Foreign()))
    state = json.loads((path / "state.json").read_text())
    with pytest.raises(CheckpointError, match="is damaged in"):
        load_plain(path)
    state["files"] = {}
    (path / "state.json").write_text(json.dumps(state))  # whoever wrote this, wrote no checksums
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_into(path, {"w": torch.zeros(1000), "n": torch.tensor(0)})
    assert not ran.exists()


def test_other_networks_checkpoints_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)[0]
    with pytest.raises(CheckpointError, match=r"does not fit in 2 tensors: bias None -> \(3,\), w \(1000,\) -> \(7,\)"):
        load_into(path, {"w": torch.zeros(7), "bias": torch.zeros(3), "n": torch.tensor(0)})
    (path / "state.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match="not one of a training run"):
        load_plain(path)


def test_checkpoints_of_an_older_version_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "step_000000007.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="step_000000007.pt"):
        load_newest(tmp_path, print)


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
from dtm_triton.train.engine.checkpoint import load_newest
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.saver import Saver
folder = Path(sys.argv[1])
found = load_newest(folder, print)
step = found[1]["step"] if found else 0
saver = Saver(folder, Processes())
print("ready", flush=True)
while True:
    step += 1
    saver.save(step, {"w": torch.full((200_000,), float(step))}, {"step": step}, best=step % 3 == 0)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 inside the saving: whatever carries a final name is whole, and what was begun is cleared away."""
    draw, last = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert not list(tmp_path.glob("*.unfinished"))
        time.sleep(draw.uniform(0.1, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        messages: list[str] = []
        found = load_newest(tmp_path, messages.append)
        assert found is not None and messages == []
        step = found[1]["step"]
        assert step > last and torch.equal(load_tensors(found[0])["w"], torch.full((200_000,), float(step)))
        best = tmp_path / json.loads((tmp_path / "best.json").read_text())["folder"]
        assert load_plain(best)["step"] % 3 == 0 and step - 3 <= load_plain(best)["step"] <= step
        last = step
