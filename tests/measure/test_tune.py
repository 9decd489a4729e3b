"""The tuner's choices, with times that the tests make up: no GPU is needed to see what it does with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from dtm_triton.kernels import groups, tables
from dtm_triton.measure import dry_run, trials, tune, tuned_table
from dtm_triton.measure.cases import OPS, Case
from dtm_triton.measure.timing import Timing

CPU = torch.device("cpu")
CASE = Case(op="unmerge", batch=1, tokens=12, channels=20, dtype=torch.float32, schedules=((4,),))
BUCKET = "c32"
MANY = (("tome_step", 300), ("match", 300))
"""Ops and numbers of tokens that are matched by streaming."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="settings of the CPU are tried in the interpreter")

Times = Callable[[dict[str, Any]], float]


def in_use() -> dict[str, Any]:
    return dict(tables.table("cpu")["settings"].get("gather", {}).get(BUCKET, {}))


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tables are read from, and written to, an empty folder."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.table.cache_clear()
    yield
    tables.table.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cpu.json"


def run(
    monkeypatch: pytest.MonkeyPatch, path: Path, times: Times, *, spread: float = 0.001, minutes: float = 5.0
) -> trials.Verdict:
    """Tune unmerging, with a candidate's time in microseconds made up by `times`."""

    def measure(function: Callable[[], object], device: torch.device, seconds: float) -> Timing:
        function()
        return Timing(median_ms=times(in_use()) / 1e3, iqr_ms=spread, calls=5)

    monkeypatch.setattr(trials.timing, "measure", measure)
    verdicts = tune.tune_all([CASE], "cpu", CPU, path, minutes=minutes, seconds=0.0)
    assert [verdict.subject.op for verdict in verdicts] == ["gather"]
    return verdicts[0]


def fast_at(**wanted: int) -> Times:
    return lambda fields: 60.0 if fields == wanted else 100.0


def test_the_fastest_is_written_and_printed(
    monkeypatch: pytest.MonkeyPatch, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = run(monkeypatch, path, fast_at(tokens=8, num_warps=2))
    assert verdict.after == {"tokens": 8, "num_warps": 2} and (verdict.old_us, verdict.new_us) == (100.0, 60.0)
    assert verdict.untried == 0 and len(verdict.trials) > 10
    content = json.loads(path.read_text())
    assert content["settings"] == {"gather": {BUCKET: {"tokens": 8, "num_warps": 2}}}
    assert content["family"] == "cpu" and content["source"] == "measured"
    assert {"device", "torch", "triton", "date"} <= content.keys()
    assert content["evidence"]["gather"][BUCKET]["before_us"] == 100.0
    printed = capsys.readouterr().out
    assert "gather [c32]: defaults -> tokens=8 num_warps=2: 100.0 us -> 60.0 us, 40 % less" in printed
    assert re.search(r" 1/\d+  \d+:\d\d left ", printed) and "1 of 1 entries" in printed


def test_candidates_run_with_their_own_settings(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    seen = []
    run(monkeypatch, path, lambda fields: seen.append(fields) or 100.0)  # type: ignore[func-returns-value]
    assert {} in seen and {"tokens": 32} in seen and len(seen) == len({repr(fields) for fields in seen})
    assert in_use() == {}


@pytest.mark.parametrize(("time", "spread"), [(98.0, 0.001), (90.0, 0.02)], ids=["small", "within the spread"])
def test_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch, path: Path, time: float, spread: float) -> None:
    verdict = run(monkeypatch, path, lambda fields: time if fields == {"tokens": 8} else 100.0, spread=spread)
    assert not verdict.changed and json.loads(path.read_text())["settings"] == {}


def test_a_lucky_measurement_is_found_out(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The winner is measured again beside what is in use."""
    seen = []

    def times(fields: dict[str, Any]) -> float:
        seen.append(fields)
        return 50.0 if fields == {"tokens": 8} and seen.count(fields) == 1 else 100.0

    assert not run(monkeypatch, path, times).changed and seen.count({"tokens": 8}) == 2


def test_an_entry_that_does_not_pay_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    before = {"gather": {BUCKET: {"tokens": 32}, "c64": {"tokens": 8}}, "count": {"any": {"rows": 8}}}
    path.write_text(json.dumps({"source": "measured", "settings": before}))
    verdict = run(monkeypatch, path, lambda fields: 70.0 if not fields else 100.0)
    assert verdict.before == {"tokens": 32} and verdict.after == {}
    assert json.loads(path.read_text())["settings"] == {"gather": {"c64": {"tokens": 8}}, "count": {"any": {"rows": 8}}}


class Faulty(KernelInterface):  # type: ignore[type-arg]
    """A kernel that fails for tiles of 8 tokens and computes nothing for tiles of 32."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__

    def run(self, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if named["TOKENS"] == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        self.kernel[grid](**named)
        if named["TOKENS"] == 32:
            named["out"].zero_()


def test_candidates_that_fail_are_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(groups, "unmerge_kernel", Faulty(groups.unmerge_kernel))
    faster = {8: 10.0, 32: 20.0}
    verdict = run(monkeypatch, path, lambda fields: faster.get(fields.get("tokens", 16), 100.0 - len(fields)))
    failed = {repr(trial.fields): trial.problem for trial in verdict.trials if trial.problem}
    assert failed["{'tokens': 8}"] == "RuntimeError: out of resource: shared memory"
    assert failed["{'tokens': 32}"].startswith("wrong: unmerge is off by")
    assert all("8" in fields or "32" in fields for fields in failed) and not verdict.changed
    printed = capsys.readouterr().out
    assert f"{len(failed)} failed" in printed and "failed: gather [c32] tokens=32: wrong" in printed


def test_settings_in_use_that_are_wrong_are_not_tuned(
    monkeypatch: pytest.MonkeyPatch, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials.gate, "check", lambda *_: (_ for _ in ()).throw(AssertionError("off by far")))
    assert tune.tune_all([CASE], "cpu", CPU, path, minutes=1.0, seconds=0.0) == []
    assert "not tuned: off by far" in capsys.readouterr().out and not path.exists()


def test_time_that_is_up(monkeypatch: pytest.MonkeyPatch, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 10**6, 20))  # every look at the clock takes 20 s
    monkeypatch.setattr(trials.time, "monotonic", lambda: next(clock))
    verdict = run(monkeypatch, path, fast_at(tokens=8), minutes=2.0)
    assert 0 < len(verdict.trials) < 10 and verdict.untried > 0
    assert f"{verdict.untried} not tried" in capsys.readouterr().out


def test_no_time_at_all(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.tune_all([CASE], "cpu", CPU, path, minutes=-1.0, seconds=0.0) == []
    assert "no time left" in capsys.readouterr().out


def test_what_several_cases_ask_for_is_tuned_once() -> None:
    morph = Case(op="morph_loss", batch=1, tokens=12, channels=20, dtype=torch.float32, schedules=((4,),))
    found = trials.subjects([CASE, CASE, morph], "cpu", CPU)
    assert (found[0].op, found[0].case.op) == ("gather", "unmerge")
    assert len({(subject.op, subject.bucket) for subject in found}) == len(found)


def test_every_op_says_which_settings_it_asks_for() -> None:
    """Also where the results, which are only recorded, make no sense."""
    small = dict(batch=1, channels=16, dtype=torch.float32)
    cases = [Case(op=op, tokens=20, schedules=((4, 3),), **small) for op in OPS if op != "tome_step"]
    cases += [Case(op=op, tokens=tokens, schedules=((4,),), **small) for op, tokens in MANY]
    with dry_run.kernels_allowed():
        found = {subject.op for subject in trials.subjects(cases, "cpu", CPU)}
    assert found == {"match", "groups", "loss", "gather", "count", "stream"}


def test_measured_entries_replace_ranked_ones_and_never_the_other_way() -> None:
    ranked = {"source": tuned_table.RANKED, "settings": {"count": {"any": {"rows": 8}}}}
    entry: tuned_table.Entry = ("gather", "c64", {"tokens": 8}, {})
    assert tuned_table.merged(ranked, {"source": tuned_table.MEASURED}, [entry])["settings"] == {
        "gather": {"c64": {"tokens": 8}}
    }
    with pytest.raises(ValueError, match="measured is not replaced"):
        tuned_table.merged({"source": tuned_table.MEASURED, "settings": {}}, {"source": tuned_table.RANKED}, [entry])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    printed = capsys.readouterr().err
    assert ended.value.code and "PyTorch sees no GPU" in printed and "--dry-run" in printed


def test_a_dry_run_ranks_by_compiled_resources(tmp_path: Path) -> None:
    """Everything in its place; nothing is written that is not better by more than an opinion."""
    path = tmp_path / "sm_90.json"
    shape = ("--op", "unmerge", "--batch", "2", "--tokens", "16", "--channels", "16")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "dtm_triton.measure.tune", "--dry-run", "--target", "sm_90", *shape)
    run = subprocess.run([*words, "--write", str(path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "sm_90: ranked by compiled resources, not measured" in run.stdout
    rows = re.findall(
        r"^ +\d+  stack (\d+) B, (\d+) .* and (\d+) warps a multi.*, (\d+) registers.*$", run.stdout, re.M
    )
    order = [(int(stack), int(spills), -int(warps), int(registers)) for stack, spills, warps, registers in rows]
    assert len(order) > 5 and order == sorted(order) and ": defaults\n" in run.stdout
    content = json.loads(path.read_text())
    assert content["source"] == "ranked by compiled resources; not measured" and content["settings"] == {}
