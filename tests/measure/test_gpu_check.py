"""The script behind `make gpu-check`, run with a stand-in for Python that fails where the test says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtm_triton.measure import small_calls

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.sh"

STAND_IN = """#!/bin/sh
case "$*" in
  -) cat > /dev/null; echo "Some GPU: Python 3.12, torch 2.11, Triton 3.6, CUDA 13.0"; exit 0 ;;
  *xdist*) exit ${XDIST:-1} ;;
esac
echo "$*" >> "$CALLS"
case "$*" in
  *${FAILS:-nothing}*) echo "went wrong"; exit 3 ;;
  *${HANGS:-nothing}*) exec sleep 60 ;;
  *) echo "12 passed" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(tmp_path: Path, python: str | None = None, **environment: str) -> tuple[int, str, list[str]]:
    """The exit code, the summary and what Python was called with."""
    calls = tmp_path / "calls"
    calls.write_text("")
    names = {"RESULTS": str(tmp_path / "results"), "CALLS": str(calls), **environment}
    names["PYTHON"] = python or str(executable(tmp_path / "python", STAND_IN))
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env={**os.environ, **names})
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert summary.splitlines()[-1] in done.stdout
    return done.returncode, summary, calls.read_text().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    code, summary, _ = run(tmp_path, python=sys.executable)
    assert code == 1 and "PyTorch sees no GPU on this machine" in summary


def test_all_steps_run_and_are_summed_up(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, PATH=f"/usr/bin:/bin:{tmp_path}")
    assert code == 0 and summary.endswith("gpu-check: all steps passed\n") and summary.startswith("Some GPU: ")
    for name in ("tests", "tuning", "training", "benchmark"):
        assert f"\n{name}: ok in " in summary
    assert "memcheck, racecheck: skipped, compute-sanitizer is not on the PATH" in summary
    modules = ["pytest", "dtm_triton.measure.tune", "dtm_triton.train.bench", "dtm_triton.measure.bench"]
    assert [call.split()[1] for call in calls] == modules, "the last one renders what the others wrote"
    assert " -n " not in calls[0]
    files = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert files == ["bench.log", "summary.txt", "tests.log"], "and five of data: eight at the most"


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    code, summary, calls = run(tmp_path, FAILS="cacheprovider")
    assert code == 1 and "tests: FAILED with exit code 3 in" in summary and "(went wrong)" in summary
    assert "tuning: ok" in summary and "benchmark: ok" in summary and len(calls) >= 3
    assert summary.endswith("gpu-check: a step FAILED\n")


def test_the_checkers_run_where_they_are(tmp_path: Path) -> None:
    executable(tmp_path / "compute-sanitizer", '#!/bin/sh\necho "sanitizer $2" >> "$CALLS"\nshift 4\nexec "$@"\n')
    code, summary, calls = run(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", XDIST="0", FAILS="tune")
    assert code == 1 and "memcheck: ok" in summary and "racecheck: ok" in summary and "tuning: FAILED" in summary
    assert "sanitizer memcheck" in calls and "sanitizer racecheck" in calls
    assert " -n 6 " in calls[0]


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    limited = executable(tmp_path / "timeout", '#!/bin/sh\nshift 3\nexec /usr/bin/timeout --signal=INT 1 "$@"\n')
    code, summary, _ = run(tmp_path, PATH=f"{limited.parent}:/usr/bin:/bin", HANGS="measure.bench")
    assert code == 1 and "benchmark: FAILED: over its limit of 100 s" in summary and "tests: ok" in summary


def test_the_limits_sum_to_less_than_nine_minutes() -> None:
    limits = {name: int(limit) for name, limit in re.findall(r'step (\w+|"[^"]+") (\d+) ', SCRIPT.read_text())}
    assert limits.keys() == {"tests", '"small calls"', '"$tool"', "tuning", "training", "benchmark"}
    assert sum(limits.values()) + limits['"$tool"'] < 9 * 60, "there are two tools"


def test_small_calls_cover_every_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {case.tokens for case in small_calls.cases()}
    assert min(tokens) <= 64 < 256 < max(tokens) and any(256 < n <= 1024 for n in tokens) and max(tokens) > 1024
    monkeypatch.setattr(sys, "argv", ["small_calls", "--device", "cpu", "--backend", "portable", "--only", "2x50"])
    small_calls.main()
    assert capsys.readouterr().out == "16 calls\n"
