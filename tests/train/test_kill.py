"""A run of two processes, killed with -9 again and again, also inside the writing of a checkpoint.

After every kill the newest checkpoint must be whole, the next start must go on from exactly that one, and at the end
weights, moments and logged losses equal those of the undisturbed run bit for bit.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import PLACES, Start
from tiny import assert_same_bits, final_state

from dtm_triton.train.engine.checkpoint import load_plain
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.engine.logbook import read_metrics
from dtm_triton.train.engine.saver import Saver

KILLS = {"ddp": 30, "fsdp": 6}
BOTH, FIRST, SECOND = (0, 1), (0,), (1,)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 for none. All must be whole."""
    paths = sorted(path for path in folder.glob("checkpoints/step_*") if path.suffix != ".unfinished")
    return max((load_plain(path)["step"] for path in paths), default=0)  # compares sizes and checksums


@pytest.mark.parametrize("strategy", KILLS)
def test_killed_at_any_moment_the_run_ends_with_the_same_bits(strategy: str, tmp_path: Path) -> None:
    draw = random.Random(strategy)
    kills = KILLS[strategy]
    changes: dict[str, Any] = dict(strategy=strategy, batch_size=64, epochs=1 + kills // 8, checkpoint_every=2)
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    places = [PLACES[number % len(PLACES)] if number % 2 else "" for number in range(kills)]
    draw.shuffle(places)
    inside, gained = 0, []
    for place in places:
        before = newest(disturbed)
        ranks = draw.choice([BOTH, FIRST, SECOND] if place in ("", "half written") else [BOTH, FIRST])
        at = ranks[-1] if place == "half written" else 0
        start = Start(disturbed, changes, {at: (place, draw.randrange(2))} if place else {})
        assert start.step == before, "goes on from the newest checkpoint, which is whole"
        if place:
            assert start.hear(at) == place
            inside += 1
        else:
            after = before + draw.randrange(4)
            start.wait_for(lambda: len(read_metrics(disturbed)) >= after)  # noqa: B023
            start.sleep(draw.uniform(0, 0.1))
        assert start.running, "killed too late: it was finished"
        start.kill(ranks)
        gained.append(newest(disturbed) - before)
        assert newest(disturbed) >= before
    assert inside == kills // 2 and max(gained) > 0
    Start(disturbed, changes, {}).finish()
    Start(calm, changes, {}).finish()
    assert_same_bits(final_state(disturbed), final_state(calm))
    rows = [[(row["step"], row.get("loss")) for row in read_metrics(folder)] for folder in (disturbed, calm)]
    assert rows[0] == rows[1]


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kill -9 cannot show, for the system outlives it: the order that a power cut asks for."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def flushed(file: int) -> None:
        fsync(file)
        events.append(("flushed", os.readlink(f"/proc/self/fd/{file}")))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("renamed", str(target)))

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    saver = Saver(tmp_path, Processes())
    saver.save(1, {"w": torch.ones(3)}, {"step": 1})
    assert saver.finish() is None
    monkeypatch.undo()
    path = tmp_path / "step_000000001"
    unfinished = f"{path}.unfinished"
    named = events.index(("renamed", str(path)))
    before = {name for kind, name in events[:named] if kind == "flushed"}
    files = {f"{unfinished}/{file.name}" for file in path.iterdir()}
    written = {name.removesuffix(".tmp") for name in before}
    assert files <= written and unfinished in before, (files, before)
    assert ("flushed", str(tmp_path)) in events[named:], "the new name too"
