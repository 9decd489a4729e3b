"""dtm-bench from end to end, on tiny cases on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dtm_triton import portable, reference
from dtm_triton.measure import bench, ceilings, gate, machine, sweep
from dtm_triton.measure.cases import OPS, Case
from dtm_triton.measure.record import Record, read_all
from dtm_triton.measure.released import FILES

TINY = [
    Case(
        op=op,
        batch=2,
        tokens=16,
        channels=8,
        dtype=torch.float32,
        schedules=((3,),) if op == "tome_step" else ((3, 2),),
        protected=int(op == "tome_step"),
    )
    for op in OPS
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cpu_cases", lambda: TINY)
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "PRODUCT_SIZE", {"cpu": 64})


def run(*words: str) -> None:
    bench.main(["--device", "cpu", "--quick", *words])


def test_it_measures_writes_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", str(tmp_path))
    (record,) = read_all(tmp_path)
    assert record.machine["kind"] == "cpu" and record.ceilings.copy_gb_s > 0 and len(record.host) == 2
    assert [row.case for row in record.rows][::3] == [case.name for case in TINY]
    for row in record.rows:
        if row.implementation == "compiled":
            assert row.reason == "no time was given for compiling" and row.median_ms is None
        else:
            assert row.median_ms and row.iqr_ms is not None and row.calls and row.peak_bytes
    page = (tmp_path / "BENCHMARKS.md").read_text()
    printed = capsys.readouterr().out
    for case in TINY:
        assert f"| {case.name} | portable |" in page
        assert f"gate: {case.name}: portable: right" in printed and f"{case.name}: portable: " in printed
    assert "GPU: not measured" in page and "not measured: no time was given for compiling" in page
    lines = printed.splitlines()
    header = next(place for place, line in enumerate(lines) if line.startswith("case "))
    assert lines[header + 1].startswith(TINY[0].name) and len(lines) > header + len(record.rows)


def test_wrong_results_stop_it_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = portable.unmerge
    monkeypatch.setattr(portable, "unmerge", lambda *arguments: 1.1 * right(*arguments))
    with pytest.raises(SystemExit) as stopped:
        run("--data", str(tmp_path))
    assert "wrong results" in str(stopped.value) and "unmerge 2x16x8" in str(stopped.value), "a text: exit code 1"
    assert not list(tmp_path.iterdir())
    assert "reference, eager" not in capsys.readouterr().out


def test_a_part_is_printed_but_not_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("wrote into the checkout")

    monkeypatch.setattr(bench, "write_page", refuse)
    monkeypatch.setattr(Record, "write", refuse)
    run("--only", "unmerge")
    printed = capsys.readouterr().out
    assert "unmerge 2x16x8" in printed and "morph 2x16x8" not in printed


def test_no_case_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no case's name contains --only 'banana'"):
        run("--only", "banana")


def test_released_programs_are_measured_beside(tmp_path: Path) -> None:
    functions = "from dtm_triton.tome import bipartite_soft_matching, merge_source, merge_wavg"
    for file in FILES.values():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(functions)
    run("--data", str(tmp_path / "data"), "--tome", str(tmp_path), "--dtm", str(tmp_path))
    (record,) = read_all(tmp_path / "data")
    measured = {(row.op, row.implementation) for row in record.rows if row.median_ms}
    assert {("tome_step", "tome"), ("match", "tome"), ("match", "dtm"), ("dtm_loss", "dtm")} <= measured
    assert ("merge", "tome") not in measured


def test_a_folder_that_is_no_checkout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"dtm-bench: .*tome/merge.py: not found; --tome takes a checkout's root"):
        run("--data", str(tmp_path), "--tome", str(tmp_path))


def test_when_time_runs_out_the_rest_says_so(tmp_path: Path) -> None:
    run("--data", str(tmp_path), "--minutes", "0")
    (record,) = read_all(tmp_path)
    assert {row.reason for row in record.rows} == {"the gate did not reach it in the time given"}


def test_a_baseline_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(reference, "unmerge", fail)
    monkeypatch.setattr(gate, "check", lambda *_: None)
    run("--data", str(tmp_path), "--only", "unmerge")
    (record,) = read_all(tmp_path)
    found = {row.implementation: row.reason for row in record.rows}
    assert found["reference"] == "fails: RuntimeError" and found["portable"] is None


def test_a_kernel_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(portable, "unmerge", fail)
    with pytest.raises(SystemExit, match="unmerge 2x16x8 .*: portable: RuntimeError: out of shared memory"):
        run("--only", "unmerge")


def test_what_is_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep, "SLOWEST", 1e-6)
    run("--data", str(tmp_path), "--only", "unmerge")
    (record,) = read_all(tmp_path)
    assert {row.reason for row in record.rows if row.implementation != "compiled"} == {"five calls take more than 0 s"}


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text(json.dumps({"source": "a tuning table", "settings": {}}))
    run("--data", str(tmp_path), "--only", "unmerge")
    assert len(read_all(tmp_path)) == 1
    bench.main(["--data", str(tmp_path), "--render"])
    assert machine.describe(torch.device("cpu"))["torch"] in (tmp_path / "BENCHMARKS.md").read_text()
