"""One setting after another on a GPU: does it run, is it right, is it faster?

A candidate must give the same bits as the settings in use, or pass the correctness gate. The fastest is measured again
beside the settings in use, and replaces them only by more than the noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtm_triton.kernels import tables
from dtm_triton.kernels.recording import recording
from dtm_triton.measure import gate, timing
from dtm_triton.measure.candidates import Fields, candidates
from dtm_triton.measure.cases import Case, call, make_inputs

LEAST_GAIN = 0.03
"""A smaller gain changes no table."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Settings to tune: an op and a bucket, and the case that shows how fast they are."""

    op: str
    bucket: str
    default: Any
    case: Case

    @property
    def name(self) -> str:
        """Op and bucket."""
        return f"{self.op} [{self.bucket}]"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one candidate."""

    fields: Fields
    microseconds: float | None = None
    spread: float = 0.0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What tuning one subject found: the fields that were in use, those to use, and the times of both."""

    subject: Subject
    before: Fields
    after: Fields
    old_us: float
    new_us: float
    trials: list[Trial]
    untried: int

    @property
    def changed(self) -> bool:
        """Whether the table's entry changes."""
        return self.before != self.after


def subjects(cases: list[Case], family: str, device: torch.device) -> list[Subject]:
    """What the cases ask settings for; where several ask for the same, the first shows how fast it is."""
    found: dict[tuple[str, str], Subject] = {}
    for case in cases:
        run = call(case, make_inputs(case, device), "triton")
        with recording(family), tables.asked() as asked:
            run()
        for (op, bucket), default in asked.items():
            subject = Subject(op=op, bucket=bucket, default=default, case=case)
            if candidates(op, bucket, default, family):
                found.setdefault((op, bucket), subject)
    return list(found.values())


def search(
    subject: Subject,
    family: str,
    device: torch.device,
    *,
    seconds: float,
    deadline: float,
    report: Callable[[int, int, Trial], None],
) -> Verdict:
    """Try all candidates until `deadline` (of time.monotonic), each timed for about `seconds`.

    Raises AssertionError when the settings in use are already wrong.
    """
    op, bucket, case = subject.op, subject.bucket, subject.case
    before = dict(tables.table(family)["settings"].get(op, {}).get(bucket, {}))
    gate.check(case, "triton", device)
    run = call(case, make_inputs(case, device), "triton")
    expected = run()
    offered = [{}, *candidates(op, bucket, subject.default, family)]
    known = {launched(run, subject, before, family)}
    chosen: list[Fields] = []
    for fields in offered:  # what changes no launch of this case needs no measurement
        launches = launched(run, subject, fields, family)
        if launches not in known:
            known.add(launches)
            chosen.append(fields)

    old = attempt(run, expected, subject, before, family, device, seconds)
    assert old.microseconds is not None, f"{subject.name}: the settings in use fail: {old.problem}"
    trials: list[Trial] = []
    for number, fields in enumerate(chosen, 1):
        if time.monotonic() > deadline:
            break
        trials.append(attempt(run, expected, subject, fields, family, device, seconds))
        report(number, len(chosen), trials[-1])
    best = min(_timed(trials), key=lambda trial: trial.microseconds or 0.0, default=old)
    after, new = before, old
    if better(old, best):
        old, new = (  # the fastest of many was also a little lucky
            attempt(run, expected, subject, fields, family, device, 2 * seconds) for fields in (before, best.fields)
        )
        after = best.fields if better(old, new) else before
    return Verdict(
        subject=subject,
        before=before,
        after=after,
        old_us=old.microseconds or 0.0,
        new_us=(new if after != before else old).microseconds or 0.0,
        trials=trials,
        untried=len(chosen) - len(trials),
    )


def _timed(trials: list[Trial]) -> Iterator[Trial]:
    return (trial for trial in trials if trial.microseconds is not None)


def better(old: Trial, new: Trial) -> bool:
    """Whether `new` is faster by more than 3 % and by more than either spreads.

    >>> better(Trial(fields={}, microseconds=100.0, spread=2.0), Trial(fields={}, microseconds=96.0, spread=3.0))
    True
    >>> better(Trial(fields={}, microseconds=100.0, spread=5.0), Trial(fields={}, microseconds=96.0, spread=3.0))
    False
    """
    if old.microseconds is None or new.microseconds is None:
        return False
    gain = old.microseconds - new.microseconds
    return gain > LEAST_GAIN * old.microseconds and gain > max(old.spread, new.spread)


def launched(run: Callable[[], object], subject: Subject, fields: Fields, family: str) -> str:
    """The launches of a call under `fields`, without launching any: equal for equal launches."""
    with tables.trial(family, subject.op, subject.bucket, fields), recording(family) as launches:
        run()
    return repr([(launch.name, launch.grid, _plain(launch.arguments)) for launch in launches])


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()
    }


def attempt(
    run: Callable[[], tuple[Tensor, ...]],
    expected: tuple[Tensor, ...],
    subject: Subject,
    fields: Fields,
    family: str,
    device: torch.device,
    seconds: float,
) -> Trial:
    """Check and time one candidate; what fails to compile, to fit or to be right is said in `problem`."""
    try:
        with tables.trial(family, subject.op, subject.bucket, fields):
            results = run()
            if not all(torch.equal(left, right) for left, right in zip(results, expected, strict=True)):
                gate.check(subject.case, "triton", device)
            found = timing.measure(run, device, seconds)
    except AssertionError as error:
        return Trial(fields=fields, problem=f"wrong: {_first_line(error)}")
    except Exception as error:  # compilers fail in many ways; one candidate must not end the search
        synchronize(device, fields)
        return Trial(fields=fields, problem=f"{type(error).__name__}: {_first_line(error)}")
    return Trial(fields=fields, microseconds=1e3 * found.median_ms, spread=1e3 * found.iqr_ms)


def synchronize(device: torch.device, fields: Fields) -> None:
    """Raise RuntimeError if the GPU has been left in error, after which nothing can be measured."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise RuntimeError(f"the GPU is in error since {fields}: start again without it") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]
